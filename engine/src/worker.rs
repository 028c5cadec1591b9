//! The thread that runs the model.
