//! The portable kernels, compiled for AVX2 and FMA.

use super::{
    Matrix,
    activations::{Activations, Line},
    portable,
};

/// See [`portable::prepare`].
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn prepare(weight: &Matrix<'_>, row0: usize, rows: usize, panel: &mut [Line]) {
    portable::prepare(weight, row0, rows, panel);
}

/// See [`portable::column`].
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
pub(super) fn column(weight: &Matrix<'_>, rows: usize, panel: &mut [Line], x: &Activations, col: usize, out: &mut [f32]) {
    portable::column::<true>(weight, rows, panel, x, col, out);
}
