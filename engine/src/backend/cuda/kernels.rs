//! The kernels that a model's steps need beside its products.

use std::collections::HashMap;

use super::{
    gpu::{Gpu, Kernel},
    products::Products,
    state::decode_heads,
    weights::suffix,
};
use crate::{backend::Shape, config::KvType, error::EngineError, gguf::DType};

/// The kernels beside the products.
pub(super) struct Kernels {
    pub(super) embed: HashMap<DType, Kernel>,
    pub(super) norm: Kernel,
    pub(super) angles: Kernel,
    pub(super) append: Kernel,
    pub(super) decode: Kernel,
    pub(super) prefill: Kernel,
    pub(super) argmax: Kernel,
    pub(super) top_k: Kernel,
}

impl Kernels {
    pub(super) fn find(
        gpu: &Gpu,
        types: &[DType],
        shape: &Shape,
        kv_type: KvType,
    ) -> Result<Self, EngineError> {
        let kv = match kv_type {
            KvType::F16 => "f16",
            KvType::F32 => "f32",
            KvType::Q8 => "q8",
        };
        let (head_dim, (heads, _)) = (shape.head_dim, decode_heads(shape));
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(EngineError::Model(format!(
                "heads are {head_dim} wide; CUDA kernels are there for {HEAD_DIMS:?}: use --backend cpu"
            )));
        }
        let append = format!("rope_append_{kv}");
        let decode = format!("attention_decode_{kv}_{head_dim}_{heads}");
        let prefill = format!("attention_prefill_{kv}_{head_dim}");
        let embed = |dtype: DType| format!("embed_{}", suffix(dtype));
        let mut names: Vec<String> = Products::names(types).chain(types.iter().map(|&t| embed(t))).collect();
        names.extend([&append, &decode, &prefill].map(String::clone));
        names.extend(["rmsnorm", "rope_angles", "argmax_rows", "top_k_rows"].map(str::to_owned));
        gpu.load_kernels(&names)?;
        let embed = types.iter().map(|&t| Ok((t, gpu.kernel(&embed(t))?)));
        Ok(Self {
            embed: embed.collect::<Result<_, EngineError>>()?,
            norm: gpu.kernel("rmsnorm")?,
            angles: gpu.kernel("rope_angles")?,
            append: gpu.kernel(&append)?,
            decode: gpu.kernel(&decode)?,
            prefill: gpu.kernel(&prefill)?,
            argmax: gpu.kernel("argmax_rows")?,
            top_k: gpu.kernel("top_k_rows")?,
        })
    }
}

/// Head widths that attention kernels are made for.
const HEAD_DIMS: [usize; 5] = [32, 64, 80, 96, 128];
