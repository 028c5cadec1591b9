//! The decoder's operations as launches.
//!
//! A step of at most `FUSED_BATCH` decoding sequences is fused: norms are part of products, gate and up are one product,
//! and attention turns its own queries; five launches a layer, one more where v is of another type than q and k, and one
//! where up is of another than the gate. Its launches are the same each time but for what the metadata say, so they are
//! captured in a graph. With at most `SMALL_BATCH` sequences it is small too: activations are in permuted order, and a
//! product normalises what it reads. In a wide step, of more sequences, the product that adds to the residual stream does
//! the first part of the norm that comes next, and its reader the rest: reading must cost nothing there. Any other step
//! has norms and RoPE in kernels of their own.

use std::{mem, sync::Arc};

use super::{
    Device,
    arguments::{Attention, Mode, Norm},
    cublas::{Cublas, LibraryProducts},
    gpu::{Dims, Gpu, Pinned, arguments},
    graphs::Graphs,
    kernels::Kernels,
    products::{FUSED_BATCH, Input, Products, SMALL_BATCH},
    rows::Rows,
    state::{State, block_bytes, decode_block, decode_heads, decode_splits},
    trace::Trace,
    weights::{Loader, Matrix, PAD, Vector, on_card, random, tile_bytes},
};
use crate::{
    backend::{
        AttentionWeights, Backend, Capacity, Counters, Demand, FeedForwardWeights, Need, Row, Shape,
        StepTimes,
    },
    device,
    error::EngineError,
    gguf::{DType, Tensor},
    sched::{BLOCK_TOKENS, Batch},
    trace::SharedTrace,
};

/// Fewest tokens worth an attention block of their own.
const LEAST_SPLIT: i32 = 64;

/// How the device is used.
#[derive(Debug, Clone, Default)]
pub struct CudaOptions {
    /// Capture fused steps in graphs: fewer launches by the host, nothing else.
    pub graphs: bool,
    /// Products of many tokens by cuBLAS instead of our own kernels.
    pub cublas: bool,
    /// Time every kernel into this.
    pub trace: Option<SharedTrace>,
}

/// The model on a CUDA device.
pub struct CudaBackend {
    gpu: Gpu,
    options: CudaOptions,
    loader: Option<Loader>,
    /// Until `allocate` gives it to the products.
    cublas: Option<Cublas>,
    /// Types of the matrices taken in, whose kernels a step needs.
    types: Vec<DType>,
    run: Option<Run>,
}

/// What `allocate` makes.
struct Run {
    state: State,
    products: Products,
    kernels: Kernels,
    graphs: Graphs,
    fused: bool,
    small: bool,
    /// The weights of the norm that reads the residual stream after the next addition, in a wide step; 0: none.
    next_norm: u64,
    /// `State::hidden` and `State::squares` hold the residual stream for that norm.
    divided: bool,
    rows: Rows,
    /// The tokens whose hidden states are wanted, and where they arrive, each in its token's place of `[T, dim]`.
    hidden_rows: Vec<u32>,
    hidden: Pinned,
}

impl CudaBackend {
    /// On an open device.
    pub fn new(device: Device, options: CudaOptions) -> Result<Self, EngineError> {
        let trace = options.trace.as_ref().map(|shared| Trace::new(device.context(), Arc::clone(shared)));
        let gpu = Gpu::new(device, trace)?;
        let cublas = options.cublas.then(|| Cublas::open(&gpu)).transpose()?;
        Ok(Self { loader: Some(Loader::new(&gpu)?), cublas, gpu, options, types: Vec::new(), run: None })
    }

    /// A layer's part of the KV cache as it lies on the device, for tests.
    #[cfg(feature = "gpu-tests")]
    pub fn stored(&self, layer: usize) -> Result<Vec<u8>, EngineError> {
        self.gpu.bind()?;
        self.run.as_ref().map_or(Ok(Vec::new()), |run| run.state.read_cache(layer))
    }

    fn note_type(&mut self, dtype: DType) {
        if !self.types.contains(&dtype) {
            self.types.push(dtype);
        }
    }

    fn parts(&mut self) -> Result<(&mut Gpu, &mut Run), EngineError> {
        let run = self.run.as_mut().ok_or_else(|| {
            EngineError::Backend("the CUDA backend was asked to run before its run state was made".into())
        })?;
        Ok((&mut self.gpu, run))
    }

    /// As [`CudaBackend::parts`], or nothing where a graph does the step's work.
    fn working(&mut self) -> Result<Option<(&mut Gpu, &mut Run)>, EngineError> {
        let (gpu, run) = self.parts()?;
        Ok((!run.graphs.replays()).then_some((gpu, run)))
    }
}

impl Backend for CudaBackend {
    type Weight = Matrix;
    type Vector = Vector;

    fn describe(&self) -> String {
        let info = self.gpu.device().info();
        let cublas = if self.options.cublas { ", cublas" } else { "" };
        format!("cuda ({}{cublas})", info.name)
    }

    fn notices(&self) -> Vec<String> {
        self.gpu.device().info().notices()
    }

    fn copies_weights(&self) -> bool {
        true
    }

    fn load(&mut self, tensor: &Tensor) -> Result<Matrix, EngineError> {
        self.gpu.bind()?;
        let loader = match &mut self.loader {
            Some(loader) => loader,
            none => none.insert(Loader::new(&self.gpu)?),
        };
        let matrix = loader.load(&self.gpu, tensor)?;
        self.note_type(matrix.dtype);
        Ok(matrix)
    }

    fn random(
        &mut self,
        dtype: DType,
        rows: usize,
        columns: usize,
        seed: u32,
    ) -> Result<Matrix, EngineError> {
        self.gpu.bind()?;
        self.note_type(on_card(dtype).0);
        random(&mut self.gpu, dtype, rows, columns, seed)
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<Vector, EngineError> {
        self.gpu.bind()?;
        Vector::new(&mut self.gpu, &values)
    }

    fn stored_bytes(&self, dtype: DType, rows: usize, columns: usize) -> u64 {
        (tile_bytes(on_card(dtype).0, rows, columns) + PAD) as u64
    }

    fn kv_room(&self, demand: &Demand<'_>) -> Result<u64, EngineError> {
        let device = self.gpu.device();
        let library =
            if self.options.cublas { LibraryProducts::bytes(demand.shape, demand.capacity) } else { 0 };
        let need = device::Need {
            weights: demand.weights,
            scratch: (State::bytes(&self.gpu, demand.shape, demand.capacity) + library) as u64,
            token_bytes: (demand.shape.layers * block_bytes(demand.shape, demand.capacity.kv_type)
                / BLOCK_TOKENS) as u64,
            ctx_size: demand.ctx_size,
        };
        device::room(device.info(), device.free_memory()?, &need)
    }

    fn commits_cache(&self) -> bool {
        true
    }

    fn allocate(&mut self, shape: &Shape, capacity: &Capacity) -> Result<(), EngineError> {
        self.gpu.bind()?;
        if let Some(loader) = self.loader.take() {
            loader.wait()?;
        }
        let kernels = Kernels::find(&self.gpu, &self.types, shape, capacity.kv_type)?;
        let cublas = self.cublas.take();
        let library = cublas.map(|c| LibraryProducts::new(&self.gpu, c, &self.types, shape, capacity));
        let products = Products::find(&self.gpu, &self.types, library.transpose()?)?;
        let state = State::new(&mut self.gpu, shape, capacity)?;
        self.run = Some(Run {
            rows: Rows::new(&self.gpu, shape, capacity)?,
            hidden_rows: Vec::with_capacity(capacity.tokens),
            hidden: Pinned::new(self.gpu.context(), capacity.tokens * shape.dim * 4, "hidden states")?,
            state,
            products,
            kernels,
            graphs: Graphs::default(),
            fused: false,
            small: false,
            next_norm: 0,
            divided: false,
        });
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.gpu.bind()?;
        let graphs = self.options.graphs && !self.gpu.is_traced();
        let (gpu, run) = self.parts()?;
        run.state.capacity.check(batch)?;
        run.state.metadata.begin(gpu, batch)?;
        for copy in &batch.copies {
            run.state.copy_block(gpu, copy.from, copy.to)?;
        }
        let tokens = batch.tokens.len();
        run.hidden_rows.clone_from(&batch.hidden_rows);
        // Hidden states are read from activations in natural order, which those of a fused step may not be in.
        let one_row_each = batch.logit_rows.len() == tokens && batch.hidden_rows.is_empty();
        run.fused = tokens <= FUSED_BATCH && run.state.metadata.tiles == 0 && one_row_each;
        run.small = run.fused && tokens <= SMALL_BATCH;
        (run.next_norm, run.divided) = (0, false);
        run.graphs.begin(gpu, tokens, graphs && run.fused)?;
        if run.graphs.replays() { Ok(()) } else { run.rows.begin(gpu, run.graphs.captures()) }
    }

    fn embed(&mut self, table: &Matrix) -> Result<(), EngineError> {
        let Some((gpu, run)) = self.working()? else { return Ok(()) };
        let (s, kernels) = (&run.state, &run.kernels);
        let (tokens, columns) = (s.metadata.tokens as i32, s.shape.dim as i32);
        let kernel = kernels.embed.get(&table.dtype).ok_or_else(|| missing("embed", table.dtype))?;
        let (tables, ids, x, permuted) =
            (table.pointer(), s.metadata.token_ids(), s.x.pointer(), i32::from(run.small));
        let dims = Dims::new((s.metadata.tokens * s.shape.dim.div_ceil(1024)).div_ceil(4), 128);
        let bytes = s.metadata.tokens as u64 * s.shape.dim as u64 * 6;
        // SAFETY: the arguments of embed.cu; x holds the step's tokens, whose ids are below the table's rows.
        unsafe { gpu.launch(kernel, dims, bytes, arguments![tables, ids, x, columns, tokens, permuted]) }?;

        let (pairs, positions) = (s.shape.rope.inverse_frequencies.len() as i32, s.metadata.positions());
        let (frequencies, magnitude) = (s.frequencies.pointer(), s.shape.rope.magnitude);
        let (cos, sin) = (s.cos.pointer(), s.sin.pointer());
        let count = s.metadata.tokens * pairs as usize;
        let arguments = arguments![positions, frequencies, magnitude, pairs, tokens, cos, sin];
        // SAFETY: the arguments of rope_angles; cos and sin hold the step's tokens.
        unsafe {
            gpu.launch(&kernels.angles, Dims::new(count.div_ceil(128), 128), 8 * count as u64, arguments)
        }
    }

    fn qkv(&mut self, _: usize, w: &AttentionWeights<Matrix, Vector>) -> Result<(), EngineError> {
        let Some((gpu, run)) = self.working()? else { return Ok(()) };
        let s = &run.state;
        let input = run.normalised(gpu, &w.norm)?;
        let bias = |i: usize| w.bias.as_ref().map_or(0, |b| b[i].natural());
        let mut outs =
            [(&w.q, s.q.pointer(), bias(0)), (&w.k, s.k.pointer(), bias(1)), (&w.v, s.v.pointer(), bias(2))];
        // Matrices of one type share a launch.
        if w.q.dtype == w.v.dtype {
            outs.swap(1, 2);
        }
        for group in outs.chunk_by(|a, b| a.0.dtype == b.0.dtype) {
            run.products.run(gpu, s, &input, Mode::Store, group)?;
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize, w: &AttentionWeights<Matrix, Vector>) -> Result<(), EngineError> {
        let Some((gpu, run)) = self.working()? else { return Ok(()) };
        let attention = run.attention(layer, w);
        let (s, m) = (&run.state, &run.state.metadata);
        let shape = &s.shape;
        let kv_token = (block_bytes(shape, s.capacity.kv_type) / BLOCK_TOKENS) as u64;
        if !run.fused {
            let heads = m.tokens * (shape.heads + 2 * shape.kv_heads);
            let bytes = (heads * shape.head_dim * 6) as u64;
            // SAFETY: the arguments of rope_append; every slot is within the cache.
            unsafe {
                gpu.launch(
                    &run.kernels.append,
                    Dims::new(heads.div_ceil(4), 128),
                    bytes,
                    arguments![attention],
                )
            }?;
        }
        if m.decoding > 0 {
            let (_, tiles) = decode_heads(shape);
            let kv_type = s.capacity.kv_type;
            let splits = decode_splits(shape, kv_type, gpu.sms(), m.decoding);
            let grid = [splits as u32, (shape.kv_heads * tiles) as u32, m.decoding as u32];
            let dims = Dims { grid, block: [decode_block(shape, kv_type).0, 1, 1], shared: 0 };
            let bytes = m.attended as u64 * kv_token;
            // SAFETY: the arguments of attention_decode; partial sums and counters hold this grid.
            unsafe { gpu.launch(&run.kernels.decode, dims, bytes, arguments![attention]) }?;
        }
        if m.tiles > 0 {
            let dims =
                Dims { grid: [m.tiles as u32, shape.kv_heads as u32, 1], block: [128, 1, 1], shared: 0 };
            let bytes = m.attended as u64 * kv_token;
            // SAFETY: the arguments of attention_prefill; the tiles are the step's.
            unsafe { gpu.launch(&run.kernels.prefill, dims, bytes, arguments![attention]) }?;
        }
        Ok(())
    }

    fn next_norm(&mut self, norm: &Vector) {
        if let Some(run) = &mut self.run
            && run.fused
            && !run.small
        {
            run.next_norm = norm.natural();
        }
    }

    fn attention_output(&mut self, w: &AttentionWeights<Matrix, Vector>) -> Result<(), EngineError> {
        let Some((gpu, run)) = self.working()? else { return Ok(()) };
        let input = run.plain(run.state.attended.pointer());
        run.add(gpu, &input, &w.output)
    }

    fn feed_forward(&mut self, w: &FeedForwardWeights<Matrix, Vector>) -> Result<(), EngineError> {
        let Some((gpu, run)) = self.working()? else { return Ok(()) };
        let s = &run.state;
        let input = run.normalised(gpu, &w.norm)?;
        let inside = s.inside.pointer();
        if run.fused && w.gate.dtype == w.up.dtype {
            run.products.run(gpu, s, &input, Mode::Gated, &[(&w.gate, inside, 0), (&w.up, inside, 0)])?;
        } else {
            run.products.run(gpu, s, &input, Mode::Gate, &[(&w.gate, inside, 0)])?;
            run.products.run(gpu, s, &input, Mode::SiluMul, &[(&w.up, inside, 0)])?;
        }
        let input = run.plain(inside);
        run.add(gpu, &input, &w.down)
    }

    fn logits(&mut self, norm: &Vector, output: &Matrix) -> Result<(), EngineError> {
        if let Some((gpu, run)) = self.working()? {
            let s = &run.state;
            let rows = s.metadata.logit_rows;
            if rows > 0 {
                let input = if run.small { run.normalised(gpu, norm)? } else { run.chosen_rows(gpu, norm)? };
                run.products.run(gpu, s, &input, Mode::Store, &[(output, s.logits.pointer(), 0)])?;
            }
        }
        let (gpu, run) = self.parts()?;
        run.graphs.finish(gpu)
    }

    fn keep_hidden(&mut self, norm: &Vector) -> Result<(), EngineError> {
        let (gpu, run) = self.parts()?;
        let count = run.state.metadata.tokens;
        // Of all tokens at once: where it is put is free again after `logits`.
        run.norm_rows(gpu, norm, 0, count)?;
        let row = run.state.shape.dim * 4;
        // Those that are wanted alone: of a prompt that is read for its last token, one row.
        for span in run.hidden_rows.chunk_by(|&token, &next| token + 1 == next) {
            let at = span[0] as usize * row;
            // SAFETY: read in `hidden`, after the wait in `rows`.
            unsafe { gpu.download(&run.state.hidden, &mut run.hidden, at, span.len() * row) }?;
        }
        Ok(())
    }

    fn rows(&mut self, needs: &[Need]) -> Result<(), EngineError> {
        let (gpu, run) = self.parts()?;
        run.rows.bring(gpu, &run.state, &run.kernels, needs)
    }

    fn wait_for_rows(&mut self, count: usize) -> Result<(), EngineError> {
        let (gpu, run) = self.parts()?;
        run.rows.wait_for(gpu, count)
    }

    fn row(&self, index: usize) -> Row<'_> {
        self.run.as_ref().map_or(Row::Best(&[]), |run| run.rows.row(index))
    }

    fn hidden(&self, index: usize) -> &[f32] {
        let Some(run) = &self.run else { return &[] };
        let (dim, token) = (run.state.shape.dim, run.hidden_rows[index] as usize);
        &run.hidden.slice::<f32>()[token * dim..(token + 1) * dim]
    }

    fn step_times(&self) -> Option<StepTimes> {
        self.run.as_ref().and_then(|run| run.rows.step_times())
    }

    fn counters(&self) -> Counters {
        self.gpu.counters()
    }
}

fn missing(verb: &str, dtype: DType) -> EngineError {
    EngineError::Backend(format!("no kernel to {verb} {} was prepared", dtype.name()))
}

impl Run {
    /// Activations of the step as they are.
    fn plain(&self, x: u64) -> Input {
        Input { x, norm: 0, small: self.small, divided: false, tokens: self.state.metadata.tokens }
    }

    /// Adds a product to the residual stream.
    fn add(&mut self, gpu: &mut Gpu, input: &Input, matrix: &Matrix) -> Result<(), EngineError> {
        let next = mem::take(&mut self.next_norm);
        self.divided = next != 0;
        let mode = if self.divided { Mode::AddNormed(next) } else { Mode::Add };
        self.products.run(gpu, &self.state, input, mode, &[(matrix, self.state.x.pointer(), 0)])
    }

    /// The residual stream as the input of products that read it normalised.
    fn normalised(&self, gpu: &mut Gpu, norm: &Vector) -> Result<Input, EngineError> {
        let s = &self.state;
        if self.small {
            return Ok(Input { norm: norm.permuted(), ..self.plain(s.x.pointer()) });
        }
        if self.divided {
            return Ok(Input { divided: true, ..self.plain(s.hidden.pointer()) });
        }
        self.norm_rows(gpu, norm, 0, s.metadata.tokens)
    }

    /// The rows whose logits are wanted, normalised.
    fn chosen_rows(&self, gpu: &mut Gpu, norm: &Vector) -> Result<Input, EngineError> {
        self.norm_rows(gpu, norm, self.state.metadata.rows(), self.state.metadata.logit_rows)
    }

    fn norm_rows(&self, gpu: &mut Gpu, norm: &Vector, rows: u64, count: usize) -> Result<Input, EngineError> {
        let s = &self.state;
        // Logits of few rows go through the kernels for small batches, which want permuted order.
        let small = rows != 0 && count <= SMALL_BATCH;
        let arguments = Norm {
            x: s.x.pointer(),
            rows,
            weight: norm.natural(),
            out: s.hidden.pointer(),
            columns: s.shape.dim as i32,
            epsilon: s.shape.norm_epsilon,
            in_permuted: 0,
            weight_permuted: 0,
            out_permuted: i32::from(small),
        };
        let bytes = 8 * (count * s.shape.dim) as u64;
        // SAFETY: the arguments of rmsnorm; `hidden` holds the rows.
        unsafe { gpu.launch(&self.kernels.norm, Dims::new(count, 256), bytes, arguments![arguments]) }?;
        Ok(Input { x: s.hidden.pointer(), norm: 0, small, divided: false, tokens: count })
    }

    fn attention(&self, layer: usize, w: &AttentionWeights<Matrix, Vector>) -> Attention {
        let (s, m) = (&self.state, &self.state.metadata);
        let qk_norm = |i: usize| w.qk_norm.as_ref().map_or(0, |n| n[i].natural());
        Attention {
            q: s.q.pointer(),
            k: s.k.pointer(),
            v: s.v.pointer(),
            q_norm: qk_norm(0),
            k_norm: qk_norm(1),
            cos: s.cos.pointer(),
            sin: s.sin.pointer(),
            cache: s.layer_cache(layer),
            sequences: m.sequences(),
            members: m.decoding_list(),
            tables: m.tables(),
            slots: m.slots(),
            tiles: m.tile_list(),
            out: s.attended.pointer(),
            partial: s.attention_partial.pointer(),
            counters: s.attention_counters.pointer(),
            tokens: m.tokens as i32,
            heads: s.shape.heads as i32,
            kv_heads: s.shape.kv_heads as i32,
            head_dim: s.shape.head_dim as i32,
            pairs: s.shape.rope.inverse_frequencies.len() as i32,
            split_half: s.split_half(),
            fused: i32::from(self.fused),
            out_permuted: i32::from(self.small),
            least: LEAST_SPLIT,
            epsilon: s.shape.norm_epsilon,
            scale: 1.0 / (s.shape.head_dim as f32).sqrt(),
        }
    }
}
