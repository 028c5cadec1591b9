//! The only reads and writes through a caller's pointers. Null, misaligned and impossibly long ones are
//! errors that name the argument; that the others point to what they say is the caller's part.

use std::{
    ffi::{CStr, c_char},
    mem::MaybeUninit,
    ptr, slice,
};

use super::status::{Failure, Status};

/// A struct that grows at its end from version to version. Its first field is its `size`: the caller's
/// `sizeof`, so that either side may be the newer one.
///
/// # Safety
/// `repr(C)` without padding; the first field is that `usize`; any bytes make a value.
pub(super) unsafe trait Versioned: Copy {}

/// No struct of this interface grows beyond; a larger `size` was never set.
const MAX_STRUCT: usize = 4096;

/// What the caller's struct says of its size; an error when it cannot be right.
///
/// # Safety
/// `pointer` points to as many bytes as its first field says.
pub(super) unsafe fn callers_size<T: Versioned>(pointer: *const T, name: &str) -> Result<usize, Failure> {
    if !pointer.is_aligned() {
        return Err(Failure::invalid(format!("{name} is misaligned")));
    }
    // SAFETY: the caller gives a struct that begins with its size, and it is aligned for that.
    let size = unsafe { pointer.cast::<usize>().read() };
    if (size_of::<usize>()..=MAX_STRUCT).contains(&size) {
        Ok(size)
    } else {
        Err(Failure::invalid(format!("{name}->size is {size}: set it to the struct's sizeof")))
    }
}

/// Options of a caller's: what is NULL, or beyond the end of an older caller's struct, is zero.
///
/// # Safety
/// `pointer` is null or points to as many bytes as its first field says.
pub(super) unsafe fn read_options<T: Versioned>(pointer: *const T, name: &str) -> Result<T, Failure> {
    let mut options = MaybeUninit::<T>::zeroed();
    if !pointer.is_null() {
        // SAFETY: not null, so as the caller promises.
        let size = unsafe { callers_size(pointer, name) }?;
        let known = size.min(size_of::<T>());
        // SAFETY: the caller's struct has `size` bytes, `options` has room for `known` of them.
        let rest = unsafe {
            ptr::copy_nonoverlapping(pointer.cast::<u8>(), options.as_mut_ptr().cast::<u8>(), known);
            slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known)
        };
        // A newer caller may ask for what this library has never heard of; it must not believe it was heard.
        if rest.iter().any(|&byte| byte != 0) {
            return Err(Failure::invalid(format!(
                "{name} asks for what this version ({}) does not know: its struct has {} bytes",
                env!("CARGO_PKG_VERSION"),
                size_of::<T>()
            )));
        }
    }
    // SAFETY: all bytes are set, and any bytes make a `Versioned` value.
    Ok(unsafe { options.assume_init() })
}

/// Fills a caller's struct as far as it reaches; what a newer caller's has beyond ours becomes zero. Its
/// `size` stays.
///
/// # Safety
/// `pointer` is null or points to as many bytes, writable, as its first field says.
pub(super) unsafe fn write_struct<T: Versioned>(
    pointer: *mut T,
    value: &T,
    name: &str,
) -> Result<(), Failure> {
    require(pointer, name)?;
    // SAFETY: not null, so as the caller promises.
    let size = unsafe { callers_size(pointer, name) }?;
    let (head, known) = (size_of::<usize>(), size.min(size_of::<T>()));
    let (from, to) = (ptr::from_ref(value).cast::<u8>(), pointer.cast::<u8>());
    // SAFETY: `to` has `size` bytes, `from` has `known` of them, and they are different structs.
    unsafe {
        ptr::copy_nonoverlapping(from.add(head), to.add(head), known - head);
        to.add(known).write_bytes(0, size - known);
    }
    Ok(())
}

/// An error unless something can be stored at `pointer`.
pub(super) fn require<T>(pointer: *mut T, name: &str) -> Result<(), Failure> {
    match pointer {
        p if p.is_null() => Err(Failure::invalid(format!("{name} is NULL"))),
        p if !p.is_aligned() => Err(Failure::invalid(format!("{name} is misaligned"))),
        _ => Ok(()),
    }
}

/// Stores one value.
///
/// # Safety
/// `pointer` is null or points to a writable `T`.
pub(super) unsafe fn store<T>(pointer: *mut T, value: T, name: &str) -> Result<(), Failure> {
    require(pointer, name)?;
    // SAFETY: neither null nor misaligned, so by the caller's word a writable `T`.
    unsafe { pointer.write(value) };
    Ok(())
}

/// A caller's array; NULL is one of no elements.
///
/// # Safety
/// `pointer` is null or points to `len` values that nobody changes while `'a` lasts.
pub(super) unsafe fn array<'a, T>(pointer: *const T, len: usize, name: &str) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    require(pointer.cast_mut(), name)?;
    if len > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::invalid(format!("{name} cannot have {len} elements")));
    }
    // SAFETY: neither null, misaligned nor too long, so by the caller's word `len` values.
    Ok(unsafe { slice::from_raw_parts(pointer, len) })
}

/// A caller's text of known length.
///
/// # Safety
/// As for [`array`].
pub(super) unsafe fn text<'a>(pointer: *const c_char, len: usize, name: &str) -> Result<&'a str, Failure> {
    // SAFETY: the caller's promise, passed on.
    let bytes = unsafe { array(pointer.cast::<u8>(), len, name) }?;
    utf8(bytes, name)
}

/// A caller's NUL-terminated text; `None` for NULL.
///
/// # Safety
/// `pointer` is null or points to a NUL-terminated string that nobody changes while `'a` lasts.
pub(super) unsafe fn string<'a>(pointer: *const c_char, name: &str) -> Result<Option<&'a str>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not null, so by the caller's word NUL-terminated.
    let bytes = unsafe { CStr::from_ptr(pointer) }.to_bytes();
    utf8(bytes, name).map(Some)
}

fn utf8<'a>(bytes: &'a [u8], name: &str) -> Result<&'a str, Failure> {
    std::str::from_utf8(bytes)
        .map_err(|e| Failure::invalid(format!("{name} is not UTF-8 at byte {}", e.valid_up_to())))
}

/// A caller's buffer with room for `capacity` elements, and where to store how many there are.
pub(super) struct Buffer<'a, T> {
    pub(super) start: *mut T,
    pub(super) capacity: usize,
    pub(super) count: *mut usize,
    /// The names of buffer and count.
    pub(super) names: [&'a str; 2],
}

/// Stores the number of `values`, then the values themselves and the terminator, if all fit.
///
/// # Safety
/// `start` is null or has room for `capacity` values, `count` is null or points to a writable `usize`.
pub(super) unsafe fn fill<T: Copy>(
    buffer: &Buffer<'_, T>,
    values: &[T],
    terminator: Option<T>,
) -> Result<(), Failure> {
    let &Buffer { start, capacity, count, names } = buffer;
    // SAFETY: the caller's promise, passed on.
    unsafe { store(count, values.len(), names[1]) }?;
    let needed = values.len() + usize::from(terminator.is_some());
    if capacity < needed {
        let message = format!("{} has room for {capacity}, {needed} are needed", names[0]);
        return Err(Failure::new(Status::BufferTooSmall, message));
    }
    if needed > 0 {
        require(start, names[0])?;
        // SAFETY: there is room for `capacity >= needed` values; `values` is memory of ours.
        unsafe {
            ptr::copy_nonoverlapping(values.as_ptr(), start, values.len());
            if let Some(end) = terminator {
                start.add(values.len()).write(end);
            }
        }
    }
    Ok(())
}
