//! Stop strings over streamed text.
//!
//! One Knuth-Morris-Pratt automaton a stop string: its state is how much of the stop string the text
//! ends with, which is at once what must be held back. The cost of a byte does not depend on how the
//! text was cut into pieces or on how long the stop strings are.

/// Finds the first stop string in a stream of text pieces and holds back what may begin one.
///
/// "First" is the one completed first; of several completed by the same character, the longest.
/// So the outcome is the same however the stream is cut into pieces.
#[derive(Debug)]
pub struct StopMatcher {
    automata: Vec<Automaton>,
    /// The end of the stream. What lies before `start` was handed out and waits to be cleared away, so
    /// that holding back much does not mean copying much on every push.
    tail: String,
    start: usize,
    /// Which of the stop strings matched, once one has.
    matched: Option<usize>,
}

/// What [`StopMatcher::push`] settles.
#[derive(Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// This text is final; more may be held back.
    Text(String),
    /// A stop string matched: this is the last text, the stop string itself left out.
    Stopped(String),
}

impl StopMatcher {
    /// Empty strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let automata = stops.map(|(index, stop)| Automaton::new(index, stop)).collect();
        Self { automata, tail: String::new(), start: 0, matched: None }
    }

    /// Adds text. After a match every further push is `Stopped` with no text.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.matched.is_some() {
            return StopOutcome::Stopped(String::new());
        }
        let before = self.tail.len();
        self.tail.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut longest: Option<&Automaton> = None;
            for automaton in &mut self.automata {
                if automaton.step(byte) && longest.is_none_or(|l| l.stop.len() < automaton.stop.len()) {
                    longest = Some(automaton);
                }
            }
            if let Some((index, length)) = longest.map(|l| (l.index, l.stop.len())) {
                // Stop strings and text are whole UTF-8, so a match begins and ends between characters.
                self.matched = Some(index);
                let last = self.hand_out(before + at + 1 - length);
                self.finish();
                return StopOutcome::Stopped(last);
            }
        }
        let keep = self.automata.iter().map(|automaton| automaton.state).max().unwrap_or(0);
        StopOutcome::Text(self.hand_out(self.tail.len() - keep))
    }

    /// What was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        let rest = self.tail.split_off(self.start);
        self.tail.clear();
        self.start = 0;
        rest
    }

    /// Which of the stop strings matched: its place in the list, of equal ones the first.
    pub fn matched(&self) -> Option<usize> {
        self.matched
    }

    /// Bytes held back now.
    pub fn held(&self) -> usize {
        self.tail.len() - self.start
    }

    /// Everything up to `end` that was not handed out before.
    fn hand_out(&mut self, end: usize) -> String {
        let text = self.tail[self.start..end].to_owned();
        self.start = end;
        if self.start > self.tail.len() / 2 {
            self.tail.drain(..self.start);
            self.start = 0;
        }
        text
    }
}

/// One stop string and how much of it the text read so far ends with.
#[derive(Debug)]
struct Automaton {
    /// Of the stop string in its list.
    index: usize,
    stop: Vec<u8>,
    /// `fallback[i]`: the longest proper prefix of `stop` that ends `stop[..=i]`.
    fallback: Vec<usize>,
    /// Always less than `stop.len()` between bytes, unless just matched.
    state: usize,
}

impl Automaton {
    fn new(index: usize, stop: &str) -> Self {
        let stop = stop.as_bytes().to_vec();
        let mut fallback = vec![0; stop.len()];
        let mut state = 0;
        for i in 1..stop.len() {
            while state > 0 && stop[i] != stop[state] {
                state = fallback[state - 1];
            }
            state += usize::from(stop[i] == stop[state]);
            fallback[i] = state;
        }
        Self { index, stop, fallback, state: 0 }
    }

    /// Reads one byte; true when the whole stop string has just been read.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.stop[self.state] != byte {
            self.state = self.fallback[self.state - 1];
        }
        self.state += usize::from(self.stop[self.state] == byte);
        self.state == self.stop.len()
    }
}
