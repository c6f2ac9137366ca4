//! A worker: the scheduler that runs blocks, those of a cluster together, on one thread of the operating system.

use super::block::{Block, Failure, Outside};
use super::error::LaunchError;
use super::fiber::Fiber;
use super::grid::Grid;
use std::cell::Cell;
use std::io;
use std::rc::Rc;

thread_local! {
    /// This thread's worker, while it does not run: its stacks outlive the launch.
    static WORKER: Cell<Option<Box<Worker>>> = const { Cell::new(None) };
}

/// Runs blocks that nobody has taken, as long as `go_on` agrees.
pub(super) fn run_blocks(grid: &Grid, mut go_on: impl FnMut() -> bool) {
    if grid.blocks_left() == 0 {
        return;
    }
    let mut worker = WORKER.take().unwrap_or_else(|| Box::new(Worker::new()));
    let _outside = Outside::new();
    worker.begin_launch(grid);
    while go_on()
        && let Some(first) = grid.take_cluster()
    {
        if let Err(error) = worker.run_cluster(grid, first) {
            grid.fail(error);
        }
    }
    WORKER.set(Some(worker));
}

struct Worker {
    /// Those of a cluster, in the order of their ranks.
    blocks: Vec<Rc<Block>>,
    fibers: Vec<Fiber>,
    /// Fibers on which no thread waits.
    idle: Vec<usize>,
}

impl Worker {
    fn new() -> Self {
        Self { blocks: Vec::new(), fibers: Vec::new(), idle: Vec::new() }
    }

    fn begin_launch(&mut self, grid: &Grid) {
        self.blocks.resize_with(grid.config.cluster as usize, Block::new);
        for block in &self.blocks {
            block.begin_launch(grid, &self.blocks);
        }
    }

    fn run_cluster(&mut self, grid: &Grid, first: u64) -> Result<(), LaunchError> {
        for (number, block) in (first..).zip(&self.blocks) {
            block.begin(grid.index_of(number));
        }
        let stacks = self.run_rounds(grid);
        self.cancel();
        let kernel = grid.kernel.name;
        stacks.map_err(|error| LaunchError::Stacks { kernel, error })?;
        for (number, block) in (first..).zip(&self.blocks) {
            let block_index = grid.index_of(number);
            match block.take_failure() {
                None => {}
                Some((thread, Failure::Panic(message))) => {
                    return Err(LaunchError::Panic { kernel, block: block_index, thread, message });
                }
                Some((thread, Failure::Divergence(message))) => {
                    return Err(LaunchError::Divergence { kernel, block: block_index, thread, message });
                }
                Some((_, Failure::Refused(reason))) => return Err(LaunchError::Refused { kernel, reason }),
            }
        }
        Ok(())
    }

    /// Lets each warp run as far as it can, again and again, until no thread is left or something has failed.
    fn run_rounds(&mut self, grid: &Grid) -> io::Result<()> {
        while let Some(running) = self.blocks.iter().position(|block| block.running.get() > 0) {
            let spins_before = self.spins();
            let mut resumes = 0;
            for rank in 0..self.blocks.len() {
                let block = Rc::clone(&self.blocks[rank]);
                for warp in 0..block.warps().len() {
                    resumes += self.run_warp(&block, warp)?;
                    if block.has_failed() {
                        return Ok(());
                    }
                }
            }
            if resumes == 0 {
                self.blocks[running].fail_stuck();
                return Ok(());
            }
            if grid.has_failed() {
                return Ok(());
            }
            if self.spins() - spins_before == resumes {
                // All that happened is that threads looked for something, which another block may be working at.
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// How often threads have spun.
    fn spins(&self) -> u64 {
        self.blocks.iter().map(|block| block.spins.get()).sum()
    }

    /// Runs the warp's threads until all wait or have returned; gives the number of times that one was resumed.
    fn run_warp(&mut self, block: &Block, number: usize) -> io::Result<u64> {
        let warp = &block.warps()[number];
        warp.ready.set(warp.ready.get() | warp.spinning.take());
        block.current_warp.set(number);
        let mut resumes = 0;
        while !block.has_failed() {
            let fiber = if warp.unstarted.get() != 0 {
                self.idle_fiber()?
            } else if warp.ready.get() != 0 {
                let lane = warp.ready.get().trailing_zeros();
                warp.ready.set(warp.ready.get() & (warp.ready.get() - 1));
                block.thread(number, lane).fiber.get()
            } else {
                break;
            };
            self.resume(block, fiber);
            resumes += 1;
        }
        Ok(resumes)
    }

    fn resume(&mut self, block: &Block, fiber: usize) {
        block.current_fiber.set(fiber);
        self.fibers[fiber].resume(block);
        if block.fiber_is_idle.take() {
            self.idle.push(fiber);
        }
    }

    fn idle_fiber(&mut self) -> io::Result<usize> {
        if let Some(fiber) = self.idle.pop() {
            return Ok(fiber);
        }
        self.fibers.push(Fiber::new(self.fibers.len())?);
        Ok(self.fibers.len() - 1)
    }

    /// Unwinds all threads that have started and not returned.
    fn cancel(&mut self) {
        for rank in 0..self.blocks.len() {
            let block = Rc::clone(&self.blocks[rank]);
            if block.running.get() == 0 {
                continue;
            }
            block.cancel();
            for (number, warp) in block.warps().iter().enumerate() {
                let mut waiting = !(warp.unstarted.take() | warp.returned.get());
                block.current_warp.set(number);
                while waiting != 0 {
                    let fiber = block.thread(number, waiting.trailing_zeros()).fiber.get();
                    self.resume(&block, fiber);
                    waiting &= waiting - 1;
                }
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Between launches every fiber is idle.
        if self.idle.len() == self.fibers.len() {
            self.fibers.drain(..).for_each(Fiber::end);
        }
    }
}
