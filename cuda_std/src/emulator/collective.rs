//! Warp collectives: operations for which lanes meet.
//!
//! Each lane leaves a pointer to its operand in its warp and waits. The last one to come computes every lane's result
//! in place and runs on without a switch; the others become ready.

use super::block::{Failure, Thread, with_thread};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::marker::PhantomData;

/// What lanes do together.
pub(crate) trait Collective {
    /// What a lane gives and gets back.
    type Operand: Copy;
    /// What it is called when it goes wrong.
    const NAME: &'static str;

    /// Replaces each lane's operand by its result.
    fn compute(lanes: &Lanes<Self::Operand>, parameter: u32);
}

/// The operands of the lanes that have met.
pub(crate) struct Lanes<'a, T> {
    slots: &'a Slots,
    present: u32,
    operands: PhantomData<T>,
}

/// Where each lane's operand is: on its own stack.
type Slots = [Cell<*mut ()>; 32];

impl<T: Copy> Lanes<'_, T> {
    /// A lane's operand; `None` for one outside the mask, or that has returned.
    #[inline(always)]
    pub(crate) fn get(&self, lane: usize) -> Option<T> {
        // SAFETY: a lane that is present waits on its stack, where the slot points to an operand of this type.
        (self.present >> lane & 1 == 1).then(|| unsafe { *self.slots[lane].get().cast::<T>() })
    }

    /// Sets the result of each lane that is present.
    #[inline(always)]
    pub(crate) fn set_each(&self, result: impl Fn(usize) -> T) {
        for lane in 0..32 {
            if self.present >> lane & 1 == 1 {
                // SAFETY: as in `get`.
                unsafe { *self.slots[lane].get().cast::<T>() = result(lane) };
            }
        }
    }
}

/// Meets the other lanes of `mask` in `C`. All must give the same `parameter`.
#[inline(always)]
pub(crate) fn collective<C: Collective>(mask: u32, parameter: u32, operand: C::Operand) -> C::Operand {
    fn compute<C: Collective>(slots: &Slots, present: u32, parameter: u32) {
        C::compute(&Lanes { slots, present, operands: PhantomData }, parameter);
    }
    let mut slot = operand;
    let operation =
        Operation { name: C::NAME, parameter, operand_bytes: size_of::<C::Operand>(), compute: compute::<C> };
    with_thread(|thread| meet(thread, operation, mask, (&raw mut slot).cast()));
    slot
}

/// A collective without its types. Lanes that meet must agree in the first three.
#[derive(Clone, Copy)]
struct Operation {
    name: &'static str,
    parameter: u32,
    operand_bytes: usize,
    compute: fn(&Slots, present: u32, parameter: u32),
}

impl Operation {
    fn agrees_with(&self, other: &Self) -> bool {
        self.parameter == other.parameter
            && self.operand_bytes == other.operand_bytes
            && (std::ptr::eq(self.name, other.name) || self.name == other.name)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parameter {
            0 => f.write_str(self.name),
            width => write!(f, "{} over {width} lanes", self.name),
        }
    }
}

/// A collective that lanes wait in.
struct Meeting {
    operation: Operation,
    mask: u32,
    arrived: u32,
}

/// A warp's collectives that lanes wait in; most of the time one or none.
#[derive(Default)]
pub(super) struct Meetings {
    slots: Slots,
    waiting: RefCell<Vec<Meeting>>,
}

impl Meetings {
    pub(super) fn clear(&self) {
        self.waiting.borrow_mut().clear();
    }

    /// The lanes that wait, per collective: which they are, for which others, and in what.
    pub(super) fn describe(&self, returned: u32) -> Vec<(u32, u32, String)> {
        let describe = |meeting: &Meeting| {
            let what = format!("{} with mask {:#010x}", meeting.operation, meeting.mask);
            (meeting.arrived, meeting.mask & !meeting.arrived & !returned, what)
        };
        self.waiting.borrow().iter().map(describe).collect()
    }

    /// Completes what waited only for lanes that have returned since; gives the lanes that become ready.
    #[inline]
    pub(super) fn settle(&self, returned: u32) -> u32 {
        if self.waiting.borrow().is_empty() { 0 } else { self.settle_all(returned) }
    }

    fn settle_all(&self, returned: u32) -> u32 {
        let mut ready = 0;
        loop {
            let mut waiting = self.waiting.borrow_mut();
            let complete = |meeting: &Meeting| meeting.mask & !(meeting.arrived | returned) == 0;
            let Some(i) = waiting.iter().position(complete) else { return ready };
            let meeting = waiting.swap_remove(i);
            drop(waiting);
            (meeting.operation.compute)(&self.slots, meeting.arrived, meeting.operation.parameter);
            ready |= meeting.arrived;
        }
    }
}

/// Brings one lane to a collective: returns when its result is in `slot`.
#[inline(always)]
fn meet(thread: &Thread, operation: Operation, mask: u32, slot: *mut ()) {
    let (warp, bit) = (thread.warp(), 1 << thread.lane());
    if mask & bit == 0 {
        thread.fail(Failure::Divergence(format!(
            "it is in {} with mask {mask:#010x}, in which its own lane, {}, is not",
            operation.name,
            thread.lane()
        )));
    }
    let meetings = &warp.meetings;
    meetings.slots[thread.lane() as usize].set(slot);
    let mut waiting = meetings.waiting.borrow_mut();
    let i = match waiting.iter().position(|meeting| meeting.mask == mask) {
        Some(i) => i,
        None => {
            waiting.push(Meeting { operation, mask, arrived: 0 });
            waiting.len() - 1
        }
    };
    if !waiting[i].operation.agrees_with(&operation) {
        let message = format!(
            "it is in {operation} with mask {mask:#010x}, while {} of the lanes in the mask wait in {}",
            waiting[i].arrived.count_ones(),
            waiting[i].operation
        );
        drop(waiting);
        thread.fail(Failure::Divergence(message));
    }
    waiting[i].arrived |= bit;
    if mask & !(waiting[i].arrived | warp.returned.get()) == 0 {
        let meeting = waiting.swap_remove(i);
        drop(waiting);
        (operation.compute)(&meetings.slots, meeting.arrived, operation.parameter);
        warp.ready.set(warp.ready.get() | meeting.arrived & !bit);
    } else {
        drop(waiting);
        thread.wait();
    }
}
