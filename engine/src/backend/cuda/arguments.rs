//! The arguments of kernels as they are laid out in `kernels/*.cuh`. Pointers are device addresses, 0 is null.

/// `struct Product` of `common.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Product {
    pub(super) weight: [u64; 3],
    pub(super) out: [u64; 3],
    pub(super) bias: [u64; 3],
    pub(super) rows: [i32; 3],
    pub(super) matrices: i32,
    pub(super) columns: i32,
    pub(super) tokens: i32,
    pub(super) mode: i32,
    pub(super) out_permuted: i32,
    pub(super) epsilon: f32,
    pub(super) x: u64,
    pub(super) norm: u64,
    pub(super) partial: u64,
    pub(super) counters: u64,
    pub(super) next: u64,
    pub(super) hidden: u64,
    pub(super) squares: u64,
    pub(super) parts: i32,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// `out = result + bias`, in natural order.
    Store,
    /// `out = result`, in the order of the step: the gate where up, of another type, comes by `SiluMul`.
    Gate,
    /// `out += result`
    Add,
    /// The same, and `out` times the norm's weights at this address goes to `State::hidden`, sums of its squares to
    /// `State::squares`: a norm but for one division a token, which products that read [`Input::divided`] do. 11 to 32 tokens.
    ///
    /// [`Input::divided`]: super::products::Input::divided
    AddNormed(u64),
    /// `out[0] = silu(result 0) * result 1`; up to 32 tokens.
    Gated,
    /// `out = silu(out) * result`
    SiluMul,
}

impl Mode {
    /// As in `enum Mode` of `common.cuh`.
    pub(super) fn kernels(self) -> i32 {
        match self {
            Self::Store | Self::Gate => 0,
            Self::Add | Self::AddNormed(_) => 1,
            Self::Gated => 2,
            Self::SiluMul => 3,
        }
    }
}

/// `struct Attention` of `attention.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Attention {
    pub(super) q: u64,
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) cos: u64,
    pub(super) sin: u64,
    pub(super) cache: u64,
    pub(super) sequences: u64,
    pub(super) members: u64,
    pub(super) tables: u64,
    pub(super) slots: u64,
    pub(super) tiles: u64,
    pub(super) out: u64,
    pub(super) partial: u64,
    pub(super) counters: u64,
    pub(super) tokens: i32,
    pub(super) heads: i32,
    pub(super) kv_heads: i32,
    pub(super) head_dim: i32,
    pub(super) pairs: i32,
    pub(super) split_half: i32,
    pub(super) fused: i32,
    pub(super) out_permuted: i32,
    pub(super) least: i32,
    pub(super) epsilon: f32,
    pub(super) scale: f32,
}

/// `struct Norm` of `norm.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Norm {
    pub(super) x: u64,
    pub(super) rows: u64,
    pub(super) weight: u64,
    pub(super) out: u64,
    pub(super) columns: i32,
    pub(super) epsilon: f32,
    pub(super) in_permuted: i32,
    pub(super) weight_permuted: i32,
    pub(super) out_permuted: i32,
}

/// `struct Logits` of `sample.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[expect(clippy::struct_field_names, reason = "the name is that of the kernels' struct")]
pub(super) struct Logits {
    pub(super) logits: u64,
    pub(super) ids: u64,
    pub(super) values: u64,
    pub(super) sums: u64,
    pub(super) partial: u64,
    pub(super) counters: u64,
    pub(super) vocab: i32,
    pub(super) k: i32,
}
