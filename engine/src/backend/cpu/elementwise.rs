//! What happens to one token at a time: RMSNorm, and a query's, key's or value's last steps.

#![allow(
    clippy::inline_always,
    reason = "vector code must unfold into the function compiled for its instruction set"
)]

use super::simd::{Simd, Task};
use crate::backend::RopeStyle;

/// RMSNorm (Zhang and Sennrich 2019) of one row: `out = x / sqrt(mean(x²) + ε) · weight`.
pub(super) struct RmsNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) weight: &'a [f32],
    pub(super) epsilon: f32,
    pub(super) out: &'a mut [f32],
}

impl Task for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = rms_scale(s, self.x, self.epsilon);
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * scale * weight;
        }
    }
}

/// `1 / sqrt(mean(x²) + ε)`
#[inline(always)]
fn rms_scale<S: Simd>(s: S, x: &[f32], epsilon: f32) -> f32 {
    let whole = x.len() - x.len() % (2 * S::LANES);
    let mut sums = [s.splat(0.0); 2];
    for i in (0..whole).step_by(2 * S::LANES) {
        for (j, sum) in sums.iter_mut().enumerate() {
            // SAFETY: both vectors are within the whole pairs of `x`.
            let v = unsafe { s.load(x.as_ptr().add(i + j * S::LANES)) };
            *sum = s.fma(v, v, *sum);
        }
    }
    let tail: f32 = x[whole..].iter().map(|x| x * x).sum();
    let squares = s.sum(s.add(sums[0], sums[1])) + tail;
    1.0 / (squares / x.len() as f32 + epsilon).sqrt()
}

/// The last steps of one token's query or key heads, in place: bias, RMSNorm of each head, `RoPE`.
pub(super) struct Heads<'a> {
    /// `[heads * head_dim]`
    pub(super) rows: &'a mut [f32],
    pub(super) head_dim: usize,
    /// `[heads * head_dim]`
    pub(super) bias: Option<&'a [f32]>,
    /// `[head_dim]`, and ε.
    pub(super) norm: Option<(&'a [f32], f32)>,
    pub(super) style: RopeStyle,
    /// Cosine and sine of each pair's angle, each `[rotary / 2]`; none for values, which are not rotated.
    pub(super) angles: (&'a [f32], &'a [f32]),
}

impl Task for Heads<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if let Some(bias) = self.bias {
            for (x, b) in self.rows.iter_mut().zip(bias) {
                *x += b;
            }
        }
        let (cos, sin) = self.angles;
        for head in self.rows.chunks_exact_mut(self.head_dim) {
            if let Some((weight, epsilon)) = self.norm {
                let scale = rms_scale(s, head, epsilon);
                for (x, w) in head.iter_mut().zip(weight) {
                    *x = *x * scale * w;
                }
            }
            rotate(self.style, cos, sin, head);
        }
    }
}

/// `RoPE` (Su et al. 2021): turns each pair of the head by its angle.
#[inline(always)]
fn rotate(style: RopeStyle, cos: &[f32], sin: &[f32], head: &mut [f32]) {
    match style {
        RopeStyle::Adjacent => {
            for ((pair, cos), sin) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
                let [a, b] = *pair;
                *pair = [a * cos - b * sin, a * sin + b * cos];
            }
        }
        RopeStyle::SplitHalf => {
            let (first, second) = head.split_at_mut(cos.len());
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
            }
        }
    }
}
