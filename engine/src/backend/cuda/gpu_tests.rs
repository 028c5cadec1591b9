//! Products, loading and sampling on a real device against f64 on the host. Fail where there is no device; the tests of
//! whole models are in `tests/gpu`.

mod sampling;

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use half::f16;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::{
    Device,
    arguments::Mode,
    cublas::{Cublas, LibraryProducts},
    gpu::{Buffer, Gpu, Pinned},
    products::{FUSED_BATCH, Input, Products, SMALL_BATCH},
    state::State,
    weights::{Loader, Matrix, ON_CARD, Vector, on_card},
};
use crate::{
    backend::{Capacity, Rope, RopeStyle, Shape},
    config::KvType,
    gguf::{DType, Tensor, dequantize},
};

/// Bits that are no number: an output that was not written shows.
const POISON: u8 = 0xff;
/// FP32 sums of up to 28672 products, against f64.
const TOLERANCE: f64 = 1e-5;

struct Rig {
    gpu: Gpu,
    loader: Loader,
    rng: ChaCha8Rng,
    state: State,
}

impl Rig {
    fn new() -> Self {
        // New numbers in every run; a failure shows the seed.
        let seed = RandomState::new().build_hasher().finish();
        println!("seed {seed:#x}");
        let device = Device::open(None, false).expect("these tests need a CUDA device");
        let mut gpu = Gpu::new(device, None).expect("a stream");
        let rope = Rope { style: RopeStyle::Adjacent, inverse_frequencies: vec![1.0; 32], magnitude: 1.0 };
        let (heads, kv_heads, head_dim, norm_epsilon) = (2, 1, 64, 1e-5);
        let shape = Shape {
            layers: 1,
            dim: 128,
            heads,
            kv_heads,
            head_dim,
            ffn_dim: 128,
            vocab: 128,
            norm_epsilon,
            rope,
        };
        let capacity =
            Capacity { tokens: 8, sequences: 8, logit_rows: 8, kv_blocks: 4, kv_type: KvType::F16 };
        let state = State::new(&mut gpu, &shape, &capacity).expect("run state");
        Self { loader: Loader::new(&gpu).expect("staging"), gpu, rng: ChaCha8Rng::seed_from_u64(seed), state }
    }

    /// All kernels of a type, loaded several at a time: on a newer card the driver compiles them, for seconds each.
    fn products(&self, dtype: DType, library: Option<LibraryProducts>) -> Products {
        let names: Vec<String> = Products::names(&[dtype]).collect();
        self.gpu.load_kernels(&names).expect("kernels");
        Products::find(&self.gpu, &[dtype], library).expect("kernels")
    }

    fn below(&mut self, n: usize) -> usize {
        (self.rng.next_u32() as usize) % n
    }

    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.rng.next_u32() >> 8) as f32 / (1u32 << 23) as f32 - 1.0).collect()
    }

    /// Random blocks: any quants, scales between 0.002 and 0.01 of either sign.
    fn tensor(&mut self, dtype: DType, rows: usize, columns: usize) -> Tensor {
        let mut bytes = vec![0; rows * dtype.row_bytes(columns)];
        self.rng.fill_bytes(&mut bytes);
        let scales: &[usize] = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => &[],
            DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
            DType::Q2_K => &[80, 82],
            DType::Q3_K => &[108],
            DType::Q6_K => &[208],
            _ => &[0],
        };
        let size = |rng: &mut ChaCha8Rng| {
            let size = 0.002 + (rng.next_u32() % 1000) as f32 * 8e-6;
            if rng.next_u32().is_multiple_of(2) { size } else { -size }
        };
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            let value = size(&mut self.rng) * 5.0;
            match dtype {
                DType::F32 => block.copy_from_slice(&value.to_le_bytes()),
                DType::F16 => block.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                DType::BF16 => block.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
                _ => {}
            }
            for &at in scales {
                block[at..at + 2].copy_from_slice(&f16::from_f32(size(&mut self.rng)).to_le_bytes());
            }
        }
        Tensor::from_bytes("random", &[columns, rows], dtype, &bytes).expect("whole blocks")
    }

    fn load(&mut self, tensor: &Tensor) -> Matrix {
        let matrix = self.loader.load(&self.gpu, tensor).expect("a matrix");
        self.loader.wait().expect("loaded");
        matrix
    }

    /// `[tokens, columns]` on the device in the order that the product wants.
    fn activations(&mut self, x: &[f32], columns: usize, small: bool) -> Buffer {
        let mut ordered = vec![0.0; x.len() + 1024];
        for (token, row) in x.chunks_exact(columns).enumerate() {
            for (column, &value) in row.iter().enumerate() {
                ordered[token * columns + place(column, columns, small)] = value;
            }
        }
        self.gpu.clone_to_device(&ordered, "x").expect("x")
    }

    fn read(&mut self, buffer: &Buffer, count: usize) -> Vec<f32> {
        let mut host = Pinned::new(self.gpu.context(), count * 4, "results").expect("pinned");
        // SAFETY: read after the wait.
        unsafe { self.gpu.download(buffer, &mut host, 0, count * 4) }.expect("a copy");
        self.gpu.synchronize().expect("a wait");
        host.slice::<f32>()[..count].to_vec()
    }
}

fn place(column: usize, columns: usize, permuted: bool) -> usize {
    if permuted { super::weights::permuted(column, columns) } else { column }
}

/// `[tokens, rows]` of `Σ weight · x` in f64.
fn multiply(tensor: &Tensor, x: &[f64]) -> Vec<f64> {
    let (rows, columns) = (tensor.rows(), tensor.cols());
    let (row_bytes, tokens) = (tensor.dtype().row_bytes(columns), x.len() / columns);
    // By rows first, so that threads have parts of their own.
    let mut by_rows = vec![0.0; tokens * rows];
    let share = rows.div_ceil(std::thread::available_parallelism().map_or(1, usize::from));
    std::thread::scope(|scope| {
        for (part, out) in by_rows.chunks_mut(share * tokens).enumerate() {
            scope.spawn(move || {
                let mut weights = vec![0.0; columns];
                for (i, out) in out.chunks_exact_mut(tokens).enumerate() {
                    let row = part * share + i;
                    let blocks = &tensor.bytes()[row * row_bytes..(row + 1) * row_bytes];
                    dequantize(tensor.dtype(), blocks, &mut weights);
                    for (out, x) in out.iter_mut().zip(x.chunks_exact(columns)) {
                        *out = weights.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
                    }
                }
            });
        }
    });
    (0..tokens * rows).map(|i| by_rows[i % rows * tokens + i / rows]).collect()
}

/// ‖a − b‖ / ‖b‖
fn difference(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let off: f64 = a.iter().zip(b).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    (off / size).sqrt()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// A product to be checked.
#[derive(Debug, Clone, Copy)]
struct Case {
    dtype: DType,
    rows: usize,
    columns: usize,
    tokens: usize,
    small: bool,
    mode: Mode,
}

/// One product in one mode, with and without a fused norm and biases where the mode has them.
fn check(rig: &mut Rig, products: &Products, case: Case) {
    let Case { dtype, rows, columns, tokens, small, mode } = case;
    let count = match mode {
        Mode::Gated => 2,
        Mode::Store => 1 + rig.below(3),
        _ => 1,
    };
    let heights: Vec<usize> =
        (0..count).map(|i| if mode == Mode::Gated || i == 0 { rows } else { 1 + rig.below(rows) }).collect();
    let tensors: Vec<Tensor> = heights.iter().map(|&rows| rig.tensor(dtype, rows, columns)).collect();
    let matrices: Vec<Matrix> = tensors.iter().map(|tensor| rig.load(tensor)).collect();
    let x = rig.numbers(tokens * columns);
    let mut input: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let norm = (small && rig.below(2) == 0).then(|| rig.numbers(columns));
    if let Some(norm) = &norm {
        for row in input.chunks_exact_mut(columns) {
            let square = row.iter().map(|x| x * x).sum::<f64>() / columns as f64;
            let scale = 1.0 / (square + f64::from(rig.state.shape.norm_epsilon)).sqrt();
            row.iter_mut().zip(norm).for_each(|(x, &w)| *x *= scale * f64::from(w));
        }
    }
    let norm = norm.map(|norm| Vector::new(&mut rig.gpu, &norm).expect("a norm"));
    let biases: Vec<Option<Vec<f32>>> =
        heights.iter().map(|&n| (mode == Mode::Store && rig.below(2) == 0).then(|| rig.numbers(n))).collect();
    let on_device: Vec<Option<Vector>> =
        biases.iter().map(|b| b.as_ref().map(|b| Vector::new(&mut rig.gpu, b).expect("a bias"))).collect();
    let before: Vec<Vec<f32>> = heights.iter().map(|&n| rig.numbers(n * tokens)).collect();
    // Stored results are in natural order, the others in the step's.
    let permuted = small && mode != Mode::Store;
    let outs: Vec<Buffer> = heights
        .iter()
        .zip(&before)
        .map(|(&n, before)| {
            let out = rig.activations(before, n, permuted);
            if matches!(mode, Mode::Store | Mode::Gate | Mode::Gated) {
                out.fill(POISON).expect("poison");
            }
            out
        })
        .collect();
    let device_x = rig.activations(&x, columns, small);
    let norm_on_device = norm.as_ref().map_or(0, Vector::permuted);
    let input_on_device =
        Input { x: device_x.pointer(), norm: norm_on_device, small, divided: false, tokens };
    let list: Vec<_> = matrices
        .iter()
        .zip(&outs)
        .zip(&on_device)
        .map(|((matrix, out), bias)| (matrix, out.pointer(), bias.as_ref().map_or(0, Vector::natural)))
        .collect();
    products.run(&mut rig.gpu, &rig.state, &input_on_device, mode, &list).expect("a launch");

    let results: Vec<Vec<f64>> = tensors.iter().map(|tensor| multiply(tensor, &input)).collect();
    for (i, &n) in heights.iter().enumerate().take(if mode == Mode::Gated { 1 } else { count }) {
        let raw = rig.read(&outs[i], n * tokens);
        let mut found = vec![0.0; n * tokens];
        let mut expected = vec![0.0; n * tokens];
        for token in 0..tokens {
            for row in 0..n {
                let at = token * n + row;
                found[at] = raw[token * n + place(row, n, permuted)];
                let result = results[i][at];
                expected[at] = match mode {
                    Mode::Store => result + biases[i].as_ref().map_or(0.0, |b| f64::from(b[row])),
                    Mode::Gate => result,
                    Mode::Add | Mode::AddNormed(_) => result + f64::from(before[i][at]),
                    Mode::Gated => silu(result) * results[1][at],
                    Mode::SiluMul => silu(f64::from(before[i][at])) * result,
                };
            }
        }
        let off = difference(&found, &expected);
        assert!(off <= TOLERANCE, "{case:?}, matrix {i} of {heights:?}: off by {off:e}");
    }
}

const MODES: [Mode; 5] = [Mode::Store, Mode::Gate, Mode::Add, Mode::SiluMul, Mode::Gated];
const COLUMNS: [usize; 7] = [576, 896, 1536, 3584, 4864, 14336, 18944];

/// Columns that a type can have, the nearest to those wanted.
fn columns_for(dtype: DType, columns: usize) -> usize {
    columns.next_multiple_of(dtype.block_len().max(32))
}

#[test]
fn products_of_every_type_equal_f64() {
    let mut rig = Rig::new();
    for dtype in ON_CARD {
        let products = rig.products(dtype, None);
        for columns in COLUMNS.map(|columns| columns_for(dtype, columns)) {
            for tokens in 1..=SMALL_BATCH {
                let mode = MODES[rig.below(5)];
                // Rows of an output in permuted order come in groups.
                let rows = if mode == Mode::Store { 1 + rig.below(150) } else { 32 * (1 + rig.below(5)) };
                check(&mut rig, &products, Case { dtype, rows, columns, tokens, small: true, mode });
            }
            for tokens in [1, 7, 11, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29, 32, 33, 64, 65, 100] {
                // Gated comes last: large batches lack it.
                let mode = MODES[rig.below(if tokens <= FUSED_BATCH { 5 } else { 4 })];
                let rows = 1 + rig.below(200);
                check(&mut rig, &products, Case { dtype, rows, columns, tokens, small: false, mode });
            }
        }
    }
}

/// A product that adds to the residual stream and begins a norm of it, and one that reads it so.
fn check_divided(
    rig: &mut Rig,
    products: &Products,
    dtype: DType,
    dim: usize,
    columns: usize,
    tokens: usize,
) {
    let capacity = Capacity { tokens: FUSED_BATCH, logit_rows: FUSED_BATCH, ..rig.state.capacity };
    let shape = Shape { dim, ..rig.state.shape.clone() };
    rig.state = State::new(&mut rig.gpu, &shape, &capacity).expect("run state");
    let (first, second) = (rig.tensor(dtype, dim, columns), rig.tensor(dtype, 100, dim));
    let (before, x, weights) = (rig.numbers(tokens * dim), rig.numbers(tokens * columns), rig.numbers(dim));
    let norm = Vector::new(&mut rig.gpu, &weights).expect("a norm");
    let (stream, x_on_device) = (rig.activations(&before, dim, false), rig.activations(&x, columns, false));
    let out = Buffer::new(rig.gpu.context(), tokens * 400, "out").expect("out");
    for buffer in [&out, &rig.state.hidden, &rig.state.squares] {
        buffer.fill(POISON).expect("poison");
    }
    let input = |x: u64, divided| Input { x, norm: 0, small: false, divided, tokens };
    let (w1, w2) = (rig.load(&first), rig.load(&second));
    let (plain, divided) = (input(x_on_device.pointer(), false), input(rig.state.hidden.pointer(), true));
    let (add, gpu, state) = (Mode::AddNormed(norm.natural()), &mut rig.gpu, &rig.state);
    products.run(gpu, state, &plain, add, &[(&w1, stream.pointer(), 0)]).expect("a launch");
    products.run(gpu, state, &divided, Mode::Store, &[(&w2, out.pointer(), 0)]).expect("a launch");

    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let sums: Vec<f64> = multiply(&first, &x).iter().zip(&before).map(|(y, &x)| y + f64::from(x)).collect();
    let off = difference(&rig.read(&stream, tokens * dim), &sums);
    assert!(off <= TOLERANCE, "{}, {dim}, {tokens} tokens, the sums: {off:e}", dtype.name());
    let mut normalised = sums;
    for row in normalised.chunks_exact_mut(dim) {
        let square = row.iter().map(|x| x * x).sum::<f64>() / dim as f64;
        let scale = 1.0 / (square + f64::from(rig.state.shape.norm_epsilon)).sqrt();
        row.iter_mut().zip(&weights).for_each(|(x, &w)| *x *= scale * f64::from(w));
    }
    let off = difference(&rig.read(&out, tokens * 100), &multiply(&second, &normalised));
    assert!(off <= TOLERANCE, "{}, {dim}, {tokens} tokens: {off:e}", dtype.name());
}

#[test]
fn a_norm_in_two_products_equals_f64() {
    let mut rig = Rig::new();
    for dtype in ON_CARD {
        let products = rig.products(dtype, None);
        // Few stripes and many, the last one not full where blocks are small enough.
        for dim in [224, 2080, 4608].map(|dim| columns_for(dtype, dim)) {
            for most in [12, 16, 20, 24, 28, FUSED_BATCH] {
                let tokens = most - rig.below(2);
                check_divided(&mut rig, &products, dtype, dim, 512, tokens);
            }
        }
    }
}

/// Every product kernel of every type, its stripes cut along the columns and shared out among blocks: for compute-sanitizer,
/// under which a launch takes long.
#[test]
fn tiny_products_of_every_type() {
    let mut rig = Rig::new();
    let columns = 1280;
    for dtype in ON_CARD {
        let products = rig.products(dtype, None);
        for tokens in [1, 2, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 64, 65] {
            let small = tokens <= SMALL_BATCH;
            let second = if tokens <= FUSED_BATCH { Mode::Gated } else { Mode::SiluMul };
            check(&mut rig, &products, Case { dtype, rows: 70, columns, tokens, small, mode: Mode::Store });
            check(&mut rig, &products, Case { dtype, rows: 64, columns, tokens, small, mode: second });
            if (SMALL_BATCH + 1..=FUSED_BATCH).contains(&tokens) {
                check_divided(&mut rig, &products, dtype, columns_for(dtype, 320), 512, tokens);
            }
        }
        println!("{}", dtype.name());
    }
}

#[test]
fn products_by_cublas_equal_f64() {
    let mut rig = Rig::new();
    // So large that the last case goes by parts.
    let shape = Shape { dim: 5000, ffn_dim: 18944, ..rig.state.shape.clone() };
    let capacity = Capacity { tokens: 100, ..rig.state.capacity };
    for dtype in ON_CARD {
        let cublas = Cublas::open(&rig.gpu).expect("cuBLAS, in a folder of LD_LIBRARY_PATH");
        let library = LibraryProducts::new(&rig.gpu, cublas, &[dtype], &shape, &capacity).expect("memory");
        let products = rig.products(dtype, Some(library));
        for columns in COLUMNS.map(|columns| columns_for(dtype, columns)) {
            // Below 33 tokens our own kernels go on as before.
            for tokens in [32, 33, 64, 100] {
                let mode = [Mode::Store, Mode::Add, Mode::SiluMul][rig.below(3)];
                let rows = 1 + rig.below(200);
                check(&mut rig, &products, Case { dtype, rows, columns, tokens, small: false, mode });
            }
        }
        if dtype == DType::Q4_K {
            for mode in [Mode::Store, Mode::Add, Mode::SiluMul] {
                let (rows, columns) = (5000, 18944);
                check(&mut rig, &products, Case { dtype, rows, columns, tokens: 40, small: false, mode });
            }
        }
    }
}

#[test]
fn converted_types_are_their_blocks_within_their_rounding() {
    let mut rig = Rig::new();
    for dtype in DType::ALL {
        let (stored, words) = on_card(dtype);
        let Some(words) = words else { continue };
        let tensor = rig.tensor(dtype, 64, 1024);
        let matrix = rig.load(&tensor);
        assert_eq!(matrix.dtype, stored);
        let x = rig.numbers(1024);
        let device_x = rig.activations(&x, 1024, true);
        let out = Buffer::new(rig.gpu.context(), 64 * 4, "out").expect("out");
        out.fill(POISON).expect("poison");
        let input = Input { x: device_x.pointer(), norm: 0, small: true, divided: false, tokens: 1 };
        let products = rig.products(stored, None);
        products
            .run(&mut rig.gpu, &rig.state, &input, Mode::Store, &[(&matrix, out.pointer(), 0)])
            .expect("a launch");
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let off = difference(&rig.read(&out, 64), &multiply(&tensor, &x));
        // A half has 11 digits, so rounding to it is off by 2^-12 of a number at most, and less in the mean.
        let tolerance = if words.contains("exactly") { TOLERANCE } else { 3e-4 };
        assert!(off <= tolerance, "{}: {off:e}", dtype.name());
    }
}
