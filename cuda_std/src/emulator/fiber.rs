//! Fibers: stacks on which the threads of a block run, kept and used again.

use super::block::Block;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::io;

/// Bytes of a fiber's stack; below it lies a guard page.
const STACK_BYTES: usize = 128 * 1024;

/// What a fiber's code suspends itself through. A resumed fiber is told the block to work on, null to end.
pub(super) type FiberYielder = Yielder<*const Block, ()>;

/// A stack with a thread on it that waits, or one that waits for threads to run.
pub(super) struct Fiber(Coroutine<*const Block, (), (), FiberStack>);

#[cfg(not(unix))]
use corosensei::stack::DefaultStack as FiberStack;
#[cfg(unix)]
use stack::FiberStack;

impl Fiber {
    /// A fiber that waits for threads to run; `number` only spreads the stacks over the CPU's caches.
    pub(super) fn new(number: usize) -> io::Result<Self> {
        #[cfg(unix)]
        let stack = FiberStack::new(number)?;
        #[cfg(not(unix))]
        let (stack, _) = (FiberStack::new(STACK_BYTES)?, number);
        Ok(Self(Coroutine::with_stack(stack, |yielder: &FiberYielder, mut block: *const Block| {
            while !block.is_null() {
                // SAFETY: whoever resumes a fiber keeps the block alive until the fiber has suspended itself.
                unsafe { &*block }.run_unstarted(yielder);
                block = yielder.suspend(());
            }
        })))
    }

    /// Runs the fiber until it suspends itself: its thread waits, or there is no thread left to start.
    pub(super) fn resume(&mut self, block: &Block) {
        let result = self.0.resume(block);
        debug_assert!(matches!(result, CoroutineResult::Yield(())), "a fiber ends only when it is told to");
    }

    /// Ends a fiber on which no thread waits. Dropping one would unwind its stack instead.
    pub(super) fn end(mut self) {
        let result = self.0.resume(std::ptr::null());
        debug_assert!(matches!(result, CoroutineResult::Return(())), "no thread waits on the fiber");
    }
}

/// A stack, allocated.
#[cfg(unix)]
mod stack {
    use super::STACK_BYTES;
    use corosensei::stack::{DefaultStack, STACK_ALIGNMENT, Stack, StackPointer};
    use std::io;

    /// Tops of stacks of one size would share a few sets of the level-1 cache; this one starts a little lower.
    pub(super) struct FiberStack {
        stack: DefaultStack,
        base: StackPointer,
    }

    const _: () = assert!(STACK_ALIGNMENT <= 64);

    impl FiberStack {
        pub(super) fn new(number: usize) -> io::Result<Self> {
            /// An odd number of cache lines.
            const STEP: usize = 5 * 64;
            let stack = DefaultStack::new(STACK_BYTES)?;
            // At most a page lower.
            let base = stack.base().get() - number * STEP % 4096;
            Ok(Self { stack, base: StackPointer::new(base).expect("a stack does not begin at address 0") })
        }
    }

    // SAFETY: a part of a valid stack, with the same guard page.
    unsafe impl Stack for FiberStack {
        fn base(&self) -> StackPointer {
            self.base
        }

        fn limit(&self) -> StackPointer {
            self.stack.limit()
        }
    }
}
