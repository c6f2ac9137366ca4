//! How a launch fails, and how a kernel's panic is caught.

use super::block;
use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::io;
use std::panic::{self, PanicHookInfo};
use std::sync::Once;

/// Why a launch failed.
#[derive(Debug)]
#[non_exhaustive]
pub enum LaunchError {
    /// A GPU would refuse the launch.
    Refused {
        /// The kernel.
        kernel: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel panicked.
    Panic {
        /// The kernel.
        kernel: &'static str,
        /// The block's index.
        block: [u32; 3],
        /// The thread's index in the block.
        thread: [u32; 3],
        /// The panic's message, and where it was.
        message: String,
    },
    /// Threads of a block wait for others that will never come.
    Divergence {
        /// The kernel.
        kernel: &'static str,
        /// The block's index.
        block: [u32; 3],
        /// A thread that waits.
        thread: [u32; 3],
        /// Who waits where.
        message: String,
    },
    /// There is no memory for the threads' stacks.
    Stacks {
        /// The kernel.
        kernel: &'static str,
        /// What the operating system says.
        error: io::Error,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { kernel, reason } => write!(f, "kernel {kernel} cannot be launched: {reason}"),
            Self::Panic { kernel, block, thread, message } => {
                write!(f, "kernel {kernel} panicked in block {block:?}, thread {thread:?}: {message}")
            }
            Self::Divergence { kernel, block, thread, message } => {
                write!(f, "kernel {kernel} is stuck in block {block:?}, thread {thread:?}: {message}")
            }
            Self::Stacks { kernel, error } => {
                write!(
                    f,
                    "kernel {kernel} needs more stacks for its threads than there is memory for: {error}"
                )
            }
        }
    }
}

impl std::error::Error for LaunchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Stacks { error, .. } => Some(error),
            _ => None,
        }
    }
}

thread_local! {
    /// The message and place of a kernel's panic, from the hook.
    static NOTE: Cell<Option<String>> = const { Cell::new(None) };
}

/// Installs a panic hook that notes a kernel's panic for the [`LaunchError`], where it is reported, and prints
/// nothing. All other panics go to the hook that was there before.
pub(super) fn keep_panics_quiet() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if block::is_inside() {
                let text = message_of(info.payload());
                NOTE.set(Some(match info.location() {
                    Some(place) => format!("{text} ({}:{})", place.file(), place.line()),
                    None => text.to_owned(),
                }));
            } else {
                previous(info);
            }
        }));
    });
}

/// What a caught panic says.
pub(super) fn describe_panic(payload: &(dyn Any + Send)) -> String {
    NOTE.take().unwrap_or_else(|| message_of(payload).to_owned())
}

fn message_of(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "a panic without a message"
    }
}
