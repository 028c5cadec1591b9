//! The gateway as a library, for the binary and the tests.
