//! Stop strings over streamed text.

/// Finds the first stop string in a stream of text pieces and holds back what may begin one.
#[derive(Debug)]
pub struct StopMatcher {}

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
        unimplemented!()
    }
    /// Adds text.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        unimplemented!()
    }
    /// What was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        unimplemented!()
    }
    /// Bytes held back now.
    pub fn held(&self) -> usize {
        unimplemented!()
    }
}
