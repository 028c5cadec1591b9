//! Vectors of f32 for the instruction sets we write for, and the way to run code compiled for one.
//!
//! A [`Task`] is written once over [`Simd`]; [`Level::run`] calls it inside a function compiled for the
//! instruction set, into which everything marked `inline(always)` unfolds. Within one level results are
//! the same to the bit; between levels they differ in rounding only.

#![allow(
    clippy::inline_always,
    reason = "vector code must unfold into the function compiled for its instruction set"
)]

use half::f16;

use super::matmul::Isa;

/// An instruction set that the vector code is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// Whatever the target's baseline is.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Work written once for all levels.
pub(super) trait Task {
    /// What it returns.
    type Out;
    /// Does it. Implementations are `inline(always)`.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

impl Level {
    /// The level that goes with a kernel family.
    pub(super) fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Level::Avx2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Level::Avx512,
            _ => Level::Portable,
        }
    }

    /// Runs the task in code compiled for this level, which must be that of an available [`Isa`].
    pub(super) fn run<T: Task>(self, task: T) -> T::Out {
        match self {
            Level::Portable => task.run(Portable),
            // SAFETY: the caller took the level from an available `Isa`.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { x86::run_avx2(task) },
            // SAFETY: the caller took the level from an available `Isa`.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { x86::run_avx512(task) },
        }
    }
}

/// Vectors of [`Simd::LANES`] f32.
///
/// A value of an implementing type stands for the fact that the instruction set is there; only
/// [`Level::run`] makes one.
pub(super) trait Simd: Copy {
    /// A vector.
    type V: Copy;
    /// Numbers in a vector: 4, 8 or 16.
    const LANES: usize;
    /// Rows of a register tile of two vectors a row: 4 or 8.
    const ROWS: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `LANES` numbers at `p` are readable.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Half-precision numbers, widened.
    /// # Safety
    /// `LANES` numbers at `p` are readable.
    unsafe fn load_half(self, p: *const f16) -> Self::V;
    /// # Safety
    /// `LANES` numbers at `p` are writable.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, rounded once where the instruction set can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each pair.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each pair.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integers.
    fn round(self, v: Self::V) -> Self::V;
    /// `v · 2^n` for whole `n` up to 127; 0 where `n` is −127 or less, for subnormal numbers are slow.
    fn scale(self, v: Self::V, n: Self::V) -> Self::V;
    /// The sum of all lanes, always in the same order.
    fn sum(self, v: Self::V) -> f32;
    /// The largest lane.
    fn largest(self, v: Self::V) -> f32;

    /// `e^v` to about 1e-7 relative; 0 below −87.7, at most `e^88` above.
    ///
    /// `e^v = 2^n · e^r` with `|r| ≤ ln 2 / 2`; the polynomial is the minimax one of Cephes' `expf`.
    #[inline(always)]
    fn exp(self, v: Self::V) -> Self::V {
        let v = self.min(self.max(v, self.splat(-100.0)), self.splat(88.0));
        let n = self.round(self.mul(v, self.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, so that n · ln 2 keeps its low bits.
        let r = self.fma(n, self.splat(-0.693_359_4), v);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.fma(p, r, self.splat(c));
        }
        let p = self.fma(p, self.mul(r, r), self.add(r, self.splat(1.0)));
        self.scale(p, n)
    }
}

/// Four lanes of plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    const ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half(self, p: *const f16) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f16; 4]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: [f32; 4]) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn mul(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        // Not `mul_add`, which is a slow library call on machines without the instruction.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i].max(b[i]))
    }
    #[inline(always)]
    fn min(self, a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i].min(b[i]))
    }
    #[inline(always)]
    fn round(self, v: [f32; 4]) -> [f32; 4] {
        // Adding and taking away 1.5 · 2²³ rounds what is below 2²² to an integer, without a library call.
        v.map(|x| (x + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn scale(self, v: [f32; 4], n: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| v[i] * f32::from_bits(((n[i].max(-127.0) as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn sum(self, v: [f32; 4]) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    fn largest(self, v: [f32; 4]) -> f32 {
        v[0].max(v[2]).max(v[1].max(v[3]))
    }
}

/// The x86 levels. Each method's unsafe block calls intrinsics of the level that its type stands for.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64 as arch;

    use super::{Simd, Task, f16};

    const NEAREST: i32 = arch::_MM_FROUND_TO_NEAREST_INT | arch::_MM_FROUND_NO_EXC;

    /// # Safety
    /// The processor has these features.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn run_avx2<T: Task>(task: T) -> T::Out {
        task.run(Avx2(()))
    }

    /// # Safety
    /// The processor has these features.
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    pub(super) unsafe fn run_avx512<T: Task>(task: T) -> T::Out {
        task.run(Avx512(()))
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx2(());

    #[derive(Clone, Copy)]
    pub(super) struct Avx512(());

    /// Methods that are one intrinsic on registers each.
    macro_rules! registers {
        ($($name:ident($($arg:ident),+) = $intrinsic:ident;)+) => { $(
            #[inline(always)]
            fn $name(self, $($arg: Self::V),+) -> Self::V {
                // SAFETY: `self` exists only where the features do.
                unsafe { arch::$intrinsic($($arg),+) }
            }
        )+ };
    }

    impl Simd for Avx2 {
        type V = arch::__m256;
        const LANES: usize = 8;
        const ROWS: usize = 4;

        registers! {
            add(a, b) = _mm256_add_ps;
            mul(a, b) = _mm256_mul_ps;
            fma(a, b, c) = _mm256_fmadd_ps;
            max(a, b) = _mm256_max_ps;
            min(a, b) = _mm256_min_ps;
        }
        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: `self` exists only where the features do.
            unsafe { arch::_mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> Self::V {
            // SAFETY: as above, and the caller's promise.
            unsafe { arch::_mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_half(self, p: *const f16) -> Self::V {
            // SAFETY: as above, and the caller's promise.
            unsafe { arch::_mm256_cvtph_ps(arch::_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: Self::V) {
            // SAFETY: as above, and the caller's promise.
            unsafe { arch::_mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        fn round(self, v: Self::V) -> Self::V {
            // SAFETY: `self` exists only where the features do.
            unsafe { arch::_mm256_round_ps::<NEAREST>(v) }
        }
        #[inline(always)]
        fn scale(self, v: Self::V, n: Self::V) -> Self::V {
            // SAFETY: `self` exists only where the features do.
            unsafe {
                let n = arch::_mm256_max_ps(n, arch::_mm256_set1_ps(-127.0));
                let exponent =
                    arch::_mm256_add_epi32(arch::_mm256_cvtps_epi32(n), arch::_mm256_set1_epi32(127));
                arch::_mm256_mul_ps(v, arch::_mm256_castsi256_ps(arch::_mm256_slli_epi32::<23>(exponent)))
            }
        }
        #[inline(always)]
        fn sum(self, v: Self::V) -> f32 {
            // SAFETY: `self` exists only where the features do.
            unsafe {
                let v =
                    arch::_mm_add_ps(arch::_mm256_castps256_ps128(v), arch::_mm256_extractf128_ps::<1>(v));
                let v = arch::_mm_add_ps(v, arch::_mm_movehl_ps(v, v));
                arch::_mm_cvtss_f32(arch::_mm_add_ss(v, arch::_mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        fn largest(self, v: Self::V) -> f32 {
            // SAFETY: `self` exists only where the features do.
            unsafe {
                let v =
                    arch::_mm_max_ps(arch::_mm256_castps256_ps128(v), arch::_mm256_extractf128_ps::<1>(v));
                let v = arch::_mm_max_ps(v, arch::_mm_movehl_ps(v, v));
                arch::_mm_cvtss_f32(arch::_mm_max_ss(v, arch::_mm_movehdup_ps(v)))
            }
        }
    }

    impl Simd for Avx512 {
        type V = arch::__m512;
        const LANES: usize = 16;
        const ROWS: usize = 8;

        registers! {
            add(a, b) = _mm512_add_ps;
            mul(a, b) = _mm512_mul_ps;
            fma(a, b, c) = _mm512_fmadd_ps;
            max(a, b) = _mm512_max_ps;
            min(a, b) = _mm512_min_ps;
        }
        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: `self` exists only where the features do.
            unsafe { arch::_mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> Self::V {
            // SAFETY: as above, and the caller's promise.
            unsafe { arch::_mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_half(self, p: *const f16) -> Self::V {
            // SAFETY: as above, and the caller's promise.
            unsafe { arch::_mm512_cvtph_ps(arch::_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: Self::V) {
            // SAFETY: as above, and the caller's promise.
            unsafe { arch::_mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        fn round(self, v: Self::V) -> Self::V {
            // SAFETY: `self` exists only where the features do.
            unsafe { arch::_mm512_roundscale_ps::<NEAREST>(v) }
        }
        #[inline(always)]
        fn scale(self, v: Self::V, n: Self::V) -> Self::V {
            // SAFETY: `self` exists only where the features do.
            unsafe {
                let normal =
                    arch::_mm512_cmp_ps_mask::<{ arch::_CMP_GT_OQ }>(n, arch::_mm512_set1_ps(-127.0));
                arch::_mm512_maskz_scalef_ps(normal, v, n)
            }
        }
        #[inline(always)]
        fn sum(self, v: Self::V) -> f32 {
            // SAFETY: `self` exists only where the features do.
            unsafe { arch::_mm512_reduce_add_ps(v) }
        }
        #[inline(always)]
        fn largest(self, v: Self::V) -> f32 {
            // SAFETY: `self` exists only where the features do.
            unsafe { arch::_mm512_reduce_max_ps(v) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels() -> impl Iterator<Item = Level> {
        Isa::available().into_iter().map(Level::of)
    }

    struct Exp<'a>(&'a mut [f32]);

    impl Task for Exp<'_> {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            for chunk in self.0.chunks_exact_mut(S::LANES) {
                // SAFETY: the chunk has `LANES` numbers.
                unsafe { s.store(chunk.as_mut_ptr(), s.exp(s.load(chunk.as_ptr()))) };
            }
        }
    }

    #[test]
    fn exp_is_exact_to_a_few_ulp() {
        for level in levels() {
            let inputs: Vec<f32> = (0..17_520).map(|i| (i as f32 - 8736.0) * 0.01).collect();
            let mut outputs = inputs.clone();
            level.run(Exp(&mut outputs));
            for (x, y) in inputs.iter().zip(&outputs) {
                if *x < -87.3 {
                    // Where results would be subnormal.
                    assert!((0.0..2e-38).contains(y), "{level:?}: exp({x}) = {y}");
                    continue;
                }
                let exact = f64::from(*x).exp();
                let error = (f64::from(*y) - exact).abs() / exact;
                assert!(error < 3e-7, "{level:?}: exp({x}) = {y}, off by {error}");
            }
            let special = [0.0, f32::NEG_INFINITY, -1e30, -89.0, 0.0, 0.0, 0.0, 0.0];
            let mut special = [special, special].concat();
            level.run(Exp(&mut special));
            assert_eq!(special[0].to_bits(), 1f32.to_bits(), "{level:?}");
            for x in &special[1..4] {
                assert!(*x == 0.0, "{level:?}: {x}");
            }
        }
    }

    struct Reduce<'a>(&'a [f32]);

    impl Task for Reduce<'_> {
        type Out = (f32, f32);
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> (f32, f32) {
            // SAFETY: the slice has 16 numbers, the widest vector.
            let v = unsafe { s.load(self.0.as_ptr()) };
            (s.sum(v), s.largest(v))
        }
    }

    #[test]
    fn reductions_cover_every_lane() {
        for (level, lanes) in levels().zip([4, 8, 16]) {
            for lane in 0..lanes {
                let mut numbers = [-1f32; 16];
                numbers[lane] = 5.0;
                assert_eq!(level.run(Reduce(&numbers)), (6.0 - lanes as f32, 5.0), "{level:?} lane {lane}");
            }
        }
    }
}
