//! Speed of the matrix products: GB/s of weights with one activation row, GFLOP/s with 2 to 512.
//!
//! `cargo bench -p m40llm-engine --bench matmul [-- NAME...]`, names being types or
//! kernel families; without one of a kind, all of it. Each figure is the best of several short runs.

use std::time::{Duration, Instant};

use m40llm_engine::{
    backend::cpu::{
        matmul::{Activations, Isa, Matrix, Mode, Output, Scratch, matmul},
        pool::Pool,
    },
    gguf::DType,
};

const SHAPES: [(usize, usize); 5] = [(1536, 576), (576, 1536), (4864, 896), (896, 4864), (151_936, 896)];

/// The shortest of many runs within a time budget.
fn best(budget: Duration, mut f: impl FnMut()) -> f64 {
    f();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < budget {
        let one = Instant::now();
        f();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

fn measure(isa: Isa, pool: &Pool, dtype: DType, (rows, cols): (usize, usize), x_rows: usize) -> Option<f64> {
    if cols % dtype.block_len() != 0 {
        return None;
    }
    // Bytes that are small normal numbers in every float type: subnormal ones would cost extra.
    let bytes: Vec<u8> = (0..rows * dtype.row_bytes(cols)).map(|i| (24 + i % 29) as u8).collect();
    let weight = Matrix::new(dtype, &bytes, rows, cols);
    let mut x = Activations::new(x_rows, cols);
    let mut scratch = Scratch::new(pool.threads(), cols);
    let mut out = vec![0f32; rows * x_rows];
    let seconds = best(Duration::from_millis(60), || {
        x.set(x_rows, cols).iter_mut().enumerate().for_each(|(i, x)| *x = (i % 17) as f32 - 8.0);
        matmul(isa, pool, weight, &mut x, Output::new(&mut out, rows, Mode::Store), &mut scratch);
    });
    Some(seconds)
}

fn main() {
    let names: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let isas = chosen(Isa::available(), Isa::name, &names);
    let dtypes = chosen(DType::ALL.to_vec(), DType::name, &names);
    for threads in [1, 2] {
        let pool = Pool::new(threads);
        for &isa in &isas {
            println!("{}, {threads} threads: GB/s with 1 row, GFLOP/s with 2, 4, 8, 16, 32 and 512", isa.name());
            for &dtype in &dtypes {
                for shape in SHAPES {
                    line(isa, &pool, dtype, shape);
                }
            }
        }
    }
}

/// Those that are named, or all.
fn chosen<T: Copy>(all: Vec<T>, name: fn(T) -> &'static str, names: &[String]) -> Vec<T> {
    let some: Vec<T> = all.iter().copied().filter(|&t| names.iter().any(|n| n == name(t))).collect();
    if some.is_empty() { all } else { some }
}

fn line(isa: Isa, pool: &Pool, dtype: DType, (rows, cols): (usize, usize)) {
    let Some(one) = measure(isa, pool, dtype, (rows, cols), 1) else { return };
    print!("{:7} {rows:6}x{cols:<5} {:7.1}", dtype.name(), (rows * dtype.row_bytes(cols)) as f64 / one / 1e9);
    let many: &[usize] = if rows > 100_000 || isa == Isa::Portable { &[4] } else { &[2, 4, 8, 16, 32, 512] };
    for &x_rows in many {
        if let Some(seconds) = measure(isa, pool, dtype, (rows, cols), x_rows) {
            print!(" {:8.0}", 2.0 * (rows * cols * x_rows) as f64 / seconds / 1e9);
        }
    }
    println!();
}
