//! The decoder written out once more, slowly, for the backends to be held to.

use m40llm_engine::{
    backend::{Rope, RopeStyle},
    gguf::Tensor,
};

use super::{Model, numbers};

/// The whole decoder in f64, from the papers: logits of each position.
pub(super) fn formula(model: &Model, tokens: &[u32]) -> Vec<Vec<f64>> {
    let s = &model.shape;
    let (hd, group) = (s.head_dim, s.heads / s.kv_heads);
    let embedding = numbers(&model.embedding);
    let mut x: Vec<Vec<f64>> =
        tokens.iter().map(|&t| wide(&embedding[t as usize * s.dim..(t as usize + 1) * s.dim])).collect();
    for (attention, feed_forward) in model.attention.iter().zip(&model.feed_forward) {
        let (mut q, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
        for (position, x) in x.iter().enumerate() {
            let h = normalize(x, &attention.norm);
            for (i, (weight, rows)) in
                [(&attention.q, &mut q), (&attention.k, &mut k), (&attention.v, &mut v)]
                    .into_iter()
                    .enumerate()
            {
                let mut y = apply(weight, &h);
                if let Some(bias) = &attention.bias {
                    y.iter_mut().zip(&bias[i]).for_each(|(y, &b)| *y += f64::from(b));
                }
                if i < 2 {
                    for head in y.chunks_exact_mut(hd) {
                        if let Some(norms) = &attention.qk_norm {
                            head.copy_from_slice(&normalize(head, &norms[i]));
                        }
                        turn(&s.rope, position, head);
                    }
                }
                rows.push(y);
            }
        }
        for (position, x) in x.iter_mut().enumerate() {
            let mut heads = Vec::new();
            for head in 0..s.heads {
                let of = |row: &[f64], head: usize| row[head * hd..(head + 1) * hd].to_vec();
                let query = of(&q[position], head);
                let scores: Vec<f64> = k[..=position]
                    .iter()
                    .map(|k| dot(&query, &of(k, head / group)) / (hd as f64).sqrt())
                    .map(f64::exp)
                    .collect();
                let total: f64 = scores.iter().sum();
                let mut sum = vec![0.0; hd];
                for (p, v) in scores.iter().zip(&v) {
                    sum.iter_mut().zip(of(v, head / group)).for_each(|(s, v)| *s += p / total * v);
                }
                heads.extend(sum);
            }
            add(x, &apply(&attention.output, &heads));
            let h = normalize(x, &feed_forward.norm);
            let (gate, up) = (apply(&feed_forward.gate, &h), apply(&feed_forward.up, &h));
            let inside: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(x, &apply(&feed_forward.down, &inside));
        }
    }
    x.iter().map(|x| apply(&model.output, &normalize(x, &model.norm))).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut [f64], y: &[f64]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn apply(weight: &Tensor, x: &[f64]) -> Vec<f64> {
    wide(&numbers(weight)).chunks_exact(x.len()).map(|row| dot(row, x)).collect()
}

fn normalize(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(1e-5f32)).sqrt();
    x.iter().zip(weight).map(|(x, &w)| x * scale * f64::from(w)).collect()
}

/// Turns pair `i` by `position · f_i`, as complex numbers.
fn turn(rope: &Rope, position: usize, head: &mut [f64]) {
    let pairs = rope.inverse_frequencies.len();
    for (i, &f) in rope.inverse_frequencies.iter().enumerate() {
        let (a, b) = match rope.style {
            RopeStyle::Adjacent => (2 * i, 2 * i + 1),
            RopeStyle::SplitHalf => (i, pairs + i),
        };
        let (sin, cos) = (position as f64 * f64::from(f)).sin_cos();
        let m = f64::from(rope.magnitude);
        (head[a], head[b]) = (m * (head[a] * cos - head[b] * sin), m * (head[a] * sin + head[b] * cos));
    }
}
