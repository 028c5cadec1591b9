//! The scheduler, rule by rule.

use crate::sched::*;

const LIMITS: Limits = Limits { tokens: 64, sequences: 4, logit_rows: 8 };

fn scheduler(blocks: usize) -> Scheduler {
    let prefix_cache = PrefixCache::PerCaller;
    Scheduler::new(Resources { limits: LIMITS, blocks, most_idle: blocks, prefix_cache })
}

fn arrival(id: u64, prompt: Vec<u32>) -> Arrival {
    Arrival {
        id: SequenceId(id),
        choices: 1,
        caller: CallerId(0),
        weight: 1,
        most: prompt.len() + 100,
        prompt,
        score_prompt: false,
        hidden_from: None,
    }
}

fn add(s: &mut Scheduler, id: u64, prompt: Vec<u32>, choices: usize, score_prompt: bool) {
    s.add(Arrival { choices, score_prompt, ..arrival(id, prompt) });
}

fn step(s: &mut Scheduler) -> (Batch, Vec<Planned>) {
    let (mut batch, mut planned) = (Batch::default(), Vec::new());
    s.plan(&mut batch, &mut planned);
    s.computed();
    s.audit();
    (batch, planned)
}

fn push_all(s: &mut Scheduler, planned: &[Planned]) {
    for plan in planned {
        s.push(plan.id, 1);
    }
}

#[test]
fn a_prompt_is_cut_into_steps_and_then_decodes() {
    let mut s = scheduler(16);
    add(&mut s, 1, (0..100).collect(), 1, false);
    let (batch, planned) = step(&mut s);
    assert_eq!((batch.tokens.len(), planned[0].tokens, planned[0].rows), (64, 64, 0));
    let (batch, planned) = step(&mut s);
    assert_eq!(batch.positions, (64..100).collect::<Vec<u32>>());
    assert_eq!(batch.logit_rows, [35]);
    assert!(planned[0].samples && planned[0].position == 99 && planned[0].cached == 0);
    assert!(step(&mut s).0.tokens.is_empty(), "nothing to do before the sampled token comes back");
    s.push(SequenceId(1), 7);
    let (batch, planned) = step(&mut s);
    assert_eq!((batch.tokens.as_slice(), batch.positions.as_slice()), (&[7][..], &[100][..]));
    assert_eq!(batch.blocks_of(&batch.sequences[0]).len(), 4);
    assert!(planned[0].samples);
}

#[test]
fn running_streams_go_before_prompts() {
    let mut s = scheduler(32);
    add(&mut s, 1, vec![1; 10], 1, false);
    step(&mut s);
    s.push(SequenceId(1), 5);
    add(&mut s, 2, vec![2; 200], 1, false);
    let (batch, _) = step(&mut s);
    // Nothing was measured yet, so a block of the prompt may join.
    assert_eq!(batch.sequences.iter().map(|q| q.len).collect::<Vec<_>>(), [1, BLOCK_TOKENS]);
}

#[test]
fn every_prompt_position_is_scored_once() {
    let mut s = scheduler(32);
    add(&mut s, 1, (0..30).collect(), 1, true);
    let mut scored = Vec::new();
    while scored.len() < 30 {
        let (batch, planned) = step(&mut s);
        assert!(batch.logit_rows.len() <= LIMITS.logit_rows);
        scored.extend(planned.iter().flat_map(|p| p.position..p.position + p.rows));
        assert_eq!(planned[0].samples, scored.len() == 30);
    }
    assert_eq!(scored, (0..30).collect::<Vec<_>>());
}

#[test]
fn choices_compute_and_hold_their_prompt_once_and_part_in_its_last_block() {
    let mut s = scheduler(32);
    add(&mut s, 0, (0..40).collect(), 3, false);
    let (batch, planned) = step(&mut s);
    assert_eq!((batch.tokens.len(), batch.logit_rows.len(), planned.len()), (40, 1, 3));
    assert!(planned.iter().all(|p| p.first_row == 0 && p.samples));
    for (i, plan) in planned.iter().enumerate() {
        s.push(plan.id, 100 + i as u32);
    }
    s.audit();
    assert_eq!((s.running(), s.pool().available(), s.pool().shared()), (3, 30, 2));
    let (batch, planned) = step(&mut s);
    // The last one to write has the block to itself by then.
    assert_eq!((batch.copies.len(), s.pool().available(), s.pool().shared()), (2, 28, 1));
    assert_eq!(batch.tokens, [100, 101, 102]);
    assert_eq!(planned.iter().map(|p| p.id.0).collect::<Vec<_>>(), [0, 1, 2]);
    for id in 0..3 {
        s.remove(SequenceId(id));
    }
    s.audit();
    assert_eq!((s.pool().available(), s.pool().idle()), (32, 1));
}

#[test]
fn more_choices_than_places_wait_with_their_prompt_held() {
    let mut s = scheduler(32);
    add(&mut s, 0, (0..70).collect(), 6, false);
    let mut left = [3usize; 6];
    let mut computed = 0;
    for _ in 0..100 {
        let (batch, planned) = step(&mut s);
        computed += batch.tokens.len();
        for plan in planned.into_iter().filter(|p| p.samples) {
            let left = &mut left[plan.id.0 as usize];
            *left -= 1;
            if *left == 0 { s.remove(plan.id) } else { s.push(plan.id, 9) }
        }
    }
    // The prompt once, and two tokens of each.
    assert_eq!((computed, left, s.pool().available()), (70 + 12, [0; 6], 32));
}

#[test]
fn a_common_beginning_is_computed_once_for_one_caller() {
    let mut s = scheduler(64);
    let text: Vec<u32> = (0..100).collect();
    add(&mut s, 1, text.clone(), 1, false);
    // Submitted at the same time: it waits for its turn, and finds what the first has computed.
    add(&mut s, 2, [&text[..], &[7; 10]].concat(), 1, false);
    let mut cached = [None; 3];
    let mut tokens = 0;
    while cached[2].is_none() {
        let (batch, planned) = step(&mut s);
        tokens += batch.tokens.len();
        for plan in planned.into_iter().filter(|p| p.samples) {
            cached[plan.id.0 as usize].get_or_insert(plan.cached);
            s.push(plan.id, 0);
        }
    }
    // By the time the second one begins, two blocks of the first one are computed. One token is generated meanwhile.
    assert_eq!((cached, tokens), ([None, Some(0), Some(64)], 100 + 110 - 64 + 1));
    s.remove(SequenceId(1));
    s.remove(SequenceId(2));
    s.add(Arrival { caller: CallerId(9), ..arrival(3, text) });
    let (batch, _) = step(&mut s);
    assert_eq!(batch.sequences[0].context, 0, "another caller's prompt is not found");
}

#[test]
fn a_whole_prompt_in_the_cache_still_computes_its_last_token() {
    let mut s = scheduler(16);
    add(&mut s, 1, (0..64).collect(), 1, false);
    step(&mut s);
    s.remove(SequenceId(1));
    add(&mut s, 2, (0..64).collect(), 1, false);
    let (batch, planned) = step(&mut s);
    assert_eq!((batch.tokens.len(), planned[0].cached), (32, 32));
    assert!(planned[0].samples);
}

#[test]
fn a_caller_with_one_request_gets_a_place_from_one_with_all_of_them() {
    let mut s = scheduler(64);
    for id in 0..6 {
        add(&mut s, id, vec![id as u32; 10], 1, false);
    }
    let (_, planned) = step(&mut s);
    assert_eq!(planned.len(), 4);
    push_all(&mut s, &planned);
    s.add(Arrival { caller: CallerId(5), ..arrival(9, vec![8; 10]) });
    let (_, planned) = step(&mut s);
    assert_eq!(planned.iter().map(|p| p.id.0).collect::<Vec<_>>(), [0, 1, 2, 9]);
    assert_eq!((s.counts().displaced, s.counts().preemptions), (1, 0));
    push_all(&mut s, &planned);
    s.remove(SequenceId(0));
    let (_, planned) = step(&mut s);
    assert_eq!(planned.iter().map(|p| p.id.0).collect::<Vec<_>>(), [1, 2, 3, 9], "back where it was");
}

#[test]
fn a_paused_sequence_keeps_its_blocks_until_somebody_needs_them() {
    let mut s = scheduler(6);
    add(&mut s, 1, vec![1; 60], 1, false);
    let (_, planned) = step(&mut s);
    s.push(planned[0].id, 5);
    s.pause(SequenceId(1));
    assert!(step(&mut s).0.tokens.is_empty());
    assert_eq!((s.paused(), s.running(), s.pool().available()), (1, 0, 4));
    add(&mut s, 2, vec![2; 150], 1, false);
    let (batch, _) = step(&mut s);
    assert_eq!((batch.tokens.len(), s.counts().preemptions), (64, 1));
    s.remove(SequenceId(2));
    s.resume(SequenceId(1));
    let (batch, planned) = step(&mut s);
    assert_eq!(batch.tokens.len(), 61 - 32, "what was needed of its blocks is computed again");
    assert!(planned[0].samples);
}

/// A prompt's vector adds them up as they come: one that came again after a preemption would count twice.
#[test]
fn a_preempted_prompt_gives_each_hidden_state_once() {
    for from in [0, 40, 149] {
        let mut s = scheduler(8);
        s.add(Arrival { hidden_from: Some(from), ..arrival(1, (0..150).collect()) });
        let (mut given, mut computed) = (Vec::new(), 0);
        let mut take = |batch: &Batch, planned: &[Planned]| {
            let plan = planned.iter().find(|p| p.id == SequenceId(1)).expect("it is in the step");
            let rows = &batch.hidden_rows[plan.first_hidden..plan.first_hidden + plan.hidden];
            given.extend(rows.iter().map(|&row| batch.positions[row as usize]));
            computed += plan.tokens;
            plan.samples
        };
        let (batch, planned) = step(&mut s);
        assert!(!take(&batch, &planned));
        s.pause(SequenceId(1));
        add(&mut s, 2, vec![2; 220], 1, false);
        while !step(&mut s).1[0].samples {}
        assert_eq!(s.counts().preemptions, 1);
        s.remove(SequenceId(2));
        s.resume(SequenceId(1));
        loop {
            let (batch, planned) = step(&mut s);
            if take(&batch, &planned) {
                break;
            }
        }
        assert!(computed > 150, "what the preemption took is computed again: {computed}");
        assert_eq!(given, (from as u32..150).collect::<Vec<_>>());
    }
}
