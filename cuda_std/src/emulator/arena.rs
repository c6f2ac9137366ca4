//! The shared memory of a block.

use std::cell::{Cell, RefCell};

/// Most bytes of `shared_array!`s in a kernel: more does not assemble.
const MAX_STATIC: usize = 48 * 1024;
/// Most bytes of shared memory in all: what an H100 gives one block.
pub const MAX_TOTAL: usize = 227 * 1024;

/// Sixteen bytes, aligned as every shared array is.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
struct Unit([u8; 16]);

impl Unit {
    /// What the memory holds before it is written: a NaN in every float type.
    const POISON: Self = Self([0xff; 16]);
    const BYTES: usize = size_of::<Self>();
}

/// The shared memory of one worker's blocks, one block after the other: dynamic memory first, then the arrays.
///
/// The arrays' places belong to a launch, in the order in which its threads first met them.
pub(super) struct Arena {
    units: RefCell<Vec<Cell<Unit>>>,
    dynamic_bytes: Cell<usize>,
    used: Cell<usize>,
    arrays: RefCell<Vec<Placed>>,
}

/// Where an array lies.
struct Placed {
    id: usize,
    unit: usize,
}

impl Arena {
    pub(super) fn new() -> Self {
        Self {
            units: RefCell::default(),
            dynamic_bytes: Cell::new(0),
            used: Cell::new(0),
            arrays: RefCell::default(),
        }
    }

    /// Forgets the arrays of the launch before.
    pub(super) fn begin_launch(&self, dynamic_bytes: usize) {
        self.dynamic_bytes.set(dynamic_bytes);
        self.used.set(dynamic_bytes.div_ceil(Unit::BYTES));
        self.arrays.borrow_mut().clear();
        let mut units = self.units.borrow_mut();
        let needed = self.used.get() + MAX_STATIC / Unit::BYTES;
        if units.len() < needed {
            units.resize(needed, Cell::new(Unit::POISON));
        }
    }

    /// Poisons the memory for a new block.
    pub(super) fn begin_block(&self) {
        self.poison(0, self.used.get());
    }

    /// The dynamic memory's address and bytes.
    pub(super) fn dynamic(&self) -> (*mut u8, u32) {
        (self.address(0), self.dynamic_bytes.get() as u32)
    }

    /// The address of array `id`; the error says why there is no room.
    pub(super) fn array(&self, id: usize, name: &str, bytes: usize) -> Result<*mut u8, String> {
        if let Some(placed) = self.arrays.borrow().iter().find(|placed| placed.id == id) {
            return Ok(self.address(placed.unit));
        }
        let unit = self.used.get();
        let dynamic = self.dynamic_bytes.get();
        let taken = (unit - dynamic.div_ceil(Unit::BYTES)) * Unit::BYTES;
        if bytes > MAX_STATIC - taken {
            return Err(format!(
                "{} bytes of shared arrays with {name}, at most {MAX_STATIC} are allowed",
                taken + bytes
            ));
        }
        if bytes > MAX_TOTAL - taken - dynamic {
            return Err(format!(
                "{} bytes of shared arrays with {name} and {dynamic} of dynamic shared memory, \
                 at most {MAX_TOTAL} are allowed together",
                taken + bytes
            ));
        }
        self.used.set(unit + bytes.div_ceil(Unit::BYTES));
        self.poison(unit, self.used.get());
        self.arrays.borrow_mut().push(Placed { id, unit });
        Ok(self.address(unit))
    }

    fn poison(&self, from: usize, to: usize) {
        for unit in &self.units.borrow()[from..to] {
            unit.set(Unit::POISON);
        }
    }

    fn address(&self, unit: usize) -> *mut u8 {
        self.units.borrow().as_ptr().wrapping_add(unit).cast_mut().cast()
    }
}
