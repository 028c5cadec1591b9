//! Products of every block type, by every kernel family this machine has, against f64 sums.

use m40llm_engine::{
    backend::cpu::{
        matmul::{Activations, Isa, Job, Matrix, Mode, Output, Scratch, matmul, matmuls},
        pool::Pool,
    },
    gguf::{DType, dequantize},
};

/// splitmix64; the seed is printed by the failing assertion's message.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Within -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Where a block keeps its halves.
fn halves(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        DType::F32 | DType::F16 | DType::BF16 => &[],
    }
}

/// Random blocks with scales of either sign around a hundredth.
fn random_weights(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Vec<u8> {
    let count = rows * cols;
    match dtype {
        DType::F32 => (0..count).flat_map(|_| random.unit().to_le_bytes()).collect(),
        DType::F16 => (0..count).flat_map(|_| half::f16::from_f32(random.unit()).to_le_bytes()).collect(),
        DType::BF16 => (0..count).flat_map(|_| half::bf16::from_f32(random.unit()).to_le_bytes()).collect(),
        _ => {
            let mut bytes: Vec<u8> = (0..rows * dtype.row_bytes(cols)).map(|_| random.next() as u8).collect();
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                for &at in halves(dtype) {
                    let value = half::f16::from_f32(random.unit() * 0.02);
                    block[at..at + 2].copy_from_slice(&value.to_le_bytes());
                }
            }
            bytes
        }
    }
}

fn cols_of(dtype: DType) -> &'static [usize] {
    match dtype.block_len() {
        1 => &[1, 15, 16, 33, 100, 576],
        32 => &[32, 64, 96, 160, 224, 256, 288, 576, 896],
        _ => &[256, 512, 1536, 2304],
    }
}

/// `[x_rows, weight_rows]` of one product.
fn product(isa: Isa, pool: &Pool, weight: Matrix<'_>, x: &[f32], x_rows: usize) -> Vec<f32> {
    let mut activations = Activations::new(x_rows, weight.cols());
    activations.set(x_rows, weight.cols()).copy_from_slice(x);
    let mut scratch = Scratch::new(pool.threads(), weight.cols());
    let mut out = vec![f32::NAN; x_rows * weight.rows()];
    let output = Output::new(&mut out, weight.rows(), Mode::Store);
    matmul(isa, pool, weight, &mut activations, output, &mut scratch);
    out
}

#[test]
fn every_type_is_exact_up_to_activation_rounding() {
    let pool = Pool::new(2);
    let mut random = Random(1);
    for dtype in DType::ALL {
        for (i, &cols) in cols_of(dtype).iter().enumerate() {
            let rows = [1, 3, 31, 33, 67][i % 5];
            let bytes = random_weights(dtype, rows, cols, &mut random);
            let weight = Matrix::new(dtype, &bytes, rows, cols);
            let mut dense = vec![0f32; rows * cols];
            dequantize(dtype, &bytes, &mut dense);
            for x_rows in [1, 2, 3, 4, 5, 7, 13] {
                let x: Vec<f32> = (0..x_rows * cols).map(|_| random.unit()).collect();
                for isa in Isa::available() {
                    let out = product(isa, &pool, weight, &x, x_rows);
                    check_against_f64(dtype, isa, &dense, rows, cols, &x, &out);
                }
            }
        }
    }
}

/// Against exact arithmetic on the 8-bit activations to 1e-5, and on the true ones to half a step each.
fn check_against_f64(
    dtype: DType,
    isa: Isa,
    dense: &[f32],
    rows: usize,
    cols: usize,
    x: &[f32],
    out: &[f32],
) {
    let x_rows = x.len() / cols;
    let mut activations = Activations::new(x_rows, cols);
    activations.set(x_rows, cols).copy_from_slice(x);
    for t in 0..x_rows {
        let x = &x[t * cols..(t + 1) * cols];
        let (used, steps) = if dtype.block_len() == 1 {
            (x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), vec![0.0; cols])
        } else {
            let (q, dx) = activations.quantized_row(t);
            let used = q.iter().enumerate().map(|(k, &q)| f64::from(q) * f64::from(dx[k / 32])).collect();
            (used, (0..cols).map(|k| f64::from(dx[k / 32])).collect())
        };
        for r in 0..rows {
            let w = &dense[r * cols..(r + 1) * cols];
            let sum = |f: &dyn Fn(usize) -> f64| (0..cols).map(f).sum::<f64>();
            let exact = sum(&|k| f64::from(w[k]) * used[k]);
            let size = sum(&|k| (f64::from(w[k]) * used[k]).abs());
            let got = f64::from(out[t * rows + r]);
            let what =
                format!("{} {} {rows}x{cols}, row {r}, column {t} of {x_rows}", isa.name(), dtype.name());
            // A minimum's part and the weight's integers may cancel, so allow for the parts' sizes.
            assert!((got - exact).abs() <= 1e-5 * (size + 0.05), "{what}: {got}, exactly {exact}");
            let truth = sum(&|k| f64::from(w[k]) * f64::from(x[k]));
            let bound = sum(&|k| f64::from(w[k]).abs() * steps[k] * 0.5001) + 1e-5 * (size + 0.05);
            assert!((got - truth).abs() <= bound, "{what}: {got}, truly {truth}, bound {bound}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_batch_or_threads() {
    let pools: Vec<Pool> = [1, 2, 3].into_iter().map(Pool::new).collect();
    let mut random = Random(2);
    for dtype in DType::ALL {
        let cols = if dtype.block_len() == 256 { 1280 } else { 576 };
        let rows = 101;
        let bytes = random_weights(dtype, rows, cols, &mut random);
        let weight = Matrix::new(dtype, &bytes, rows, cols);
        let x: Vec<f32> = (0..40 * cols).map(|_| random.unit()).collect();
        for isa in Isa::available() {
            let alone: Vec<f32> =
                x.chunks_exact(cols).flat_map(|x| product(isa, &pools[0], weight, x, 1)).collect();
            for x_rows in (1..=14).chain([39, 40]) {
                let pool = &pools[x_rows % 3];
                let out = product(isa, pool, weight, &x[..x_rows * cols], x_rows);
                for (i, (a, b)) in out.iter().zip(&alone).enumerate() {
                    let (t, r) = (i / rows, i % rows);
                    let what = format!("{} {}, row {r}, column {t} of {x_rows}", isa.name(), dtype.name());
                    assert_eq!(a.to_bits(), b.to_bits(), "{what}: {a} and {b}");
                }
            }
        }
    }
}

#[test]
fn families_with_fused_arithmetic_agree() {
    let pool = Pool::new(1);
    let mut random = Random(3);
    for dtype in DType::ALL {
        let (rows, cols) = (35, 768);
        let bytes = random_weights(dtype, rows, cols, &mut random);
        let weight = Matrix::new(dtype, &bytes, rows, cols);
        let x: Vec<f32> = (0..2 * cols).map(|_| random.unit()).collect();
        let results: Vec<Vec<f32>> = Isa::available()
            .into_iter()
            .filter(|&isa| isa != Isa::Portable)
            .map(|isa| product(isa, &pool, weight, &x, 2))
            .collect();
        for result in &results {
            assert!(
                result.iter().zip(&results[0]).all(|(a, b)| a.to_bits() == b.to_bits()),
                "{}",
                dtype.name()
            );
        }
    }
}

#[test]
fn jobs_share_a_dispatch_add_and_gate() {
    let pool = Pool::new(2);
    let mut random = Random(4);
    let (cols, q_rows, k_rows, x_max) = (576, 70, 33, 9);
    let q_bytes = random_weights(DType::Q4_1, q_rows, cols, &mut random);
    let k_bytes = random_weights(DType::Q8_0, k_rows, cols, &mut random);
    let up_bytes = random_weights(DType::F16, q_rows, cols, &mut random);
    let q = Matrix::new(DType::Q4_1, &q_bytes, q_rows, cols);
    let k = Matrix::new(DType::Q8_0, &k_bytes, k_rows, cols);
    let up = Matrix::new(DType::F16, &up_bytes, q_rows, cols);
    for isa in Isa::available() {
        for x_rows in [1, 3, x_max] {
            let x: Vec<f32> = (0..x_rows * cols).map(|_| 0.1 * random.unit()).collect();
            let mut activations = Activations::new(x_max, 1000);
            activations.set(x_rows, cols).copy_from_slice(&x);
            let mut scratch = Scratch::new(2, 1000);
            let stride = q_rows + 5;
            let (mut a, mut b, mut c) =
                (vec![7.0; x_rows * stride], vec![2.0; x_rows * k_rows], vec![0.0; x_rows * q_rows]);
            let mut jobs = [
                Job::Plain { weight: q, out: Output::new(&mut a, stride, Mode::Store) },
                Job::Plain { weight: k, out: Output::new(&mut b, k_rows, Mode::Add) },
                Job::Gated { gate: q, up, out: Output::new(&mut c, q_rows, Mode::Store) },
            ];
            matmuls(isa, &pool, &mut jobs, &mut activations, &mut scratch);
            let [qx, kx, ux] = [q, k, up].map(|w| product(isa, &pool, w, &x, x_rows));
            for t in 0..x_rows {
                assert_eq!(a[t * stride..t * stride + q_rows], qx[t * q_rows..(t + 1) * q_rows]);
                assert!(
                    a[t * stride + q_rows..(t + 1) * stride].iter().all(|v| v.to_bits() == 7f32.to_bits()),
                    "beyond the row"
                );
            }
            assert!(b.iter().zip(&kx).all(|(b, k)| b.to_bits() == (2.0 + k).to_bits()));
            for (c, (g, u)) in c.iter().zip(qx.iter().zip(&ux)) {
                let exact = f64::from(*g) / (1.0 + (-f64::from(*g)).exp()) * f64::from(*u);
                assert!((f64::from(*c) - exact).abs() <= 1e-5 * exact.abs() + 1e-30, "{c}, exactly {exact}");
            }
        }
    }
}

#[test]
fn zeros_and_tiny_activations_stay_finite() {
    let pool = Pool::new(1);
    let mut random = Random(5);
    for dtype in DType::ALL {
        let bytes = random_weights(dtype, 5, 256, &mut random);
        let weight = Matrix::new(dtype, &bytes, 5, 256);
        for value in [0.0, f32::MIN_POSITIVE, 1e-45, 1e30] {
            for isa in Isa::available() {
                let out = product(isa, &pool, weight, &[value; 256], 1);
                assert!(
                    out.iter().all(|v| v.is_finite()),
                    "{} {} {value}: {out:?}",
                    isa.name(),
                    dtype.name()
                );
            }
        }
    }
}
