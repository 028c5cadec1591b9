//! One vector of a prompt's hidden states.

/// The sum of those that were asked for so far; where that is the last one alone, it is the mean itself.
#[derive(Debug, Default)]
pub(super) struct Vector {
    sum: Vec<f64>,
    count: usize,
}

impl Vector {
    pub(super) fn add<'h>(&mut self, states: impl Iterator<Item = &'h [f32]>) {
        for state in states {
            self.sum.resize(state.len(), 0.0);
            self.sum.iter_mut().zip(state).for_each(|(sum, &x)| *sum += f64::from(x));
            self.count += 1;
        }
    }

    pub(super) fn mean(self) -> Vec<f32> {
        let count = self.count.max(1) as f64;
        self.sum.into_iter().map(|sum| (sum / count) as f32).collect()
    }
}
