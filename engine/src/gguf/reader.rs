//! Little-endian reads that cannot leave the file, and the limit on what a header may take on the heap.

use std::fmt::Display;

/// Longest key or tensor name in bytes (the specification's limit for keys).
const MAX_NAME: u64 = 65_535;

/// Most heap a file's metadata and tensor table may take, all parts together. Real headers take 5 to 40 MB;
/// without a limit a sparse file of many gigabytes would be copied into memory as "strings".
pub(super) const HEAP_LIMIT: usize = 256 << 20;

/// A result whose error is the rest of a line: the caller prepends the file, the key or the tensor.
pub(super) type Checked<T> = Result<T, String>;

/// Text of a file as it may stand in a one-line message: quoted, escaped, cut.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(96) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// What is left of [`HEAP_LIMIT`].
pub(super) struct HeapBudget(usize);

impl HeapBudget {
    pub(super) fn new() -> Self {
        Self(HEAP_LIMIT)
    }

    /// Pays for `count` items of `size` bytes before they are allocated.
    pub(super) fn take(&mut self, count: usize, size: usize) -> Checked<()> {
        let left = count.checked_mul(size).and_then(|bytes| self.0.checked_sub(bytes));
        self.0 = left.ok_or_else(|| format!("its metadata needs more than {} MiB", HEAP_LIMIT >> 20))?;
        Ok(())
    }
}

/// A position in the mapped file.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, len: usize) -> Checked<&'a [u8]> {
        if len > self.remaining() {
            return Err(format!(
                "cut short: the file ends at byte {}, within {len} bytes from byte {} on",
                self.bytes.len(),
                self.position
            ));
        }
        let taken = &self.bytes[self.position..self.position + len];
        self.position += len;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Checked<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self) -> Checked<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Checked<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Checks that `count` items of at least `min_size` bytes each can still follow.
    pub(super) fn count(&self, count: u64, min_size: usize, what: impl Display) -> Checked<usize> {
        match usize::try_from(count) {
            Ok(n) if n <= self.remaining() / min_size => Ok(n),
            _ => Err(format!("{count} {what} cannot fit in the {} bytes that follow", self.remaining())),
        }
    }

    /// A string; its heap is paid from `budget`.
    pub(super) fn string(&mut self, budget: &mut HeapBudget) -> Checked<String> {
        let len = self.u64()?;
        let len = self.count(len, 1, "bytes of a string")?;
        budget.take(len + size_of::<String>(), 1)?;
        let start = self.position;
        match str::from_utf8(self.take(len)?) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => Err(format!("the string is not UTF-8 (byte {})", start + e.valid_up_to())),
        }
    }

    /// A key or a tensor name: short and not empty.
    pub(super) fn name(&mut self, budget: &mut HeapBudget) -> Checked<String> {
        let start = self.position;
        let len = self.u64()?;
        if len == 0 || len > MAX_NAME {
            return Err(format!("a name of {len} bytes (1 to {MAX_NAME} are allowed) at byte {start}"));
        }
        self.position = start;
        self.string(budget)
    }
}
