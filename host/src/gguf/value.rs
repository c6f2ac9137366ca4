//! Metadata values: GGUF's types, and their conversion to Rust's.

use std::fmt;

use serde::{Serialize, Serializer};

use super::text::Shown;

/// One row per number type: the enums, their names and conversions all come from here.
macro_rules! value_types {
    ($($variant:ident($ty:ty) = $id:literal, $name:literal;)*) => {
        /// The type of a metadata value.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum ValueType {
            $(#[doc = concat!("`", $name, "`")] $variant = $id,)*
            /// An array: an element type, a count, the elements.
            Array = 9,
        }

        impl ValueType {
            /// The type with this number in a file.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$variant),)*
                    9 => Some(Self::Array),
                    _ => None,
                }
            }

            /// The name shown to users, such as `u32`.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Array => "array",
                }
            }
        }

        /// A metadata value.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Value {
            $(#[doc = concat!("A value of type `", $name, "`.")] $variant($ty),)*
            /// An array.
            Array(Array),
        }

        impl Value {
            /// The value's type.
            pub fn value_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Array(_) => ValueType::Array,
                }
            }
        }

        /// An array of metadata values, all of one type.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Array {
            $(#[doc = concat!("An array of `", $name, "`.")] $variant(Vec<$ty>),)*
            /// An array of arrays.
            Array(Vec<Array>),
        }

        impl Array {
            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$variant(items) => items.len(),)*
                    Self::Array(items) => items.len(),
                }
            }

            /// The type of the elements.
            pub fn element_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Array(_) => ValueType::Array,
                }
            }

            /// The elements from the first on.
            pub fn iter(&self) -> Box<dyn Iterator<Item = Value> + '_> {
                match self {
                    $(Self::$variant(items) => Box::new(items.iter().cloned().map(Value::$variant)),)*
                    Self::Array(items) => Box::new(items.iter().cloned().map(Value::Array)),
                }
            }
        }

        $(
            impl From<$ty> for Value {
                fn from(value: $ty) -> Self {
                    Self::$variant(value)
                }
            }

            impl From<Vec<$ty>> for Value {
                fn from(items: Vec<$ty>) -> Self {
                    Self::Array(Array::$variant(items))
                }
            }
        )*

        impl Serialize for Value {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $(Self::$variant(value) => value.serialize(serializer),)*
                    Self::Array(array) => array.serialize(serializer),
                }
            }
        }

        impl Serialize for Array {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $(Self::$variant(items) => items.serialize(serializer),)*
                    Self::Array(items) => items.serialize(serializer),
                }
            }
        }
    };
}

value_types! {
    U8(u8) = 0, "u8";
    I8(i8) = 1, "i8";
    U16(u16) = 2, "u16";
    I16(i16) = 3, "i16";
    U32(u32) = 4, "u32";
    I32(i32) = 5, "i32";
    F32(f32) = 6, "f32";
    Bool(bool) = 7, "bool";
    String(String) = 8, "string";
    U64(u64) = 10, "u64";
    I64(i64) = 11, "i64";
    F64(f64) = 12, "f64";
}

impl Value {
    /// Any integer, whatever its width.
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            Self::U8(n) => Some(n.into()),
            Self::I8(n) => Some(n.into()),
            Self::U16(n) => Some(n.into()),
            Self::I16(n) => Some(n.into()),
            Self::U32(n) => Some(n.into()),
            Self::I32(n) => Some(n.into()),
            Self::U64(n) => Some(n.into()),
            Self::I64(n) => Some(n.into()),
            _ => None,
        }
    }

    /// Any floating-point number, whatever its width.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Self::F32(x) => Some(x.into()),
            Self::F64(x) => Some(x),
            _ => None,
        }
    }
}

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_owned())
    }
}

impl From<Array> for Value {
    fn from(array: Array) -> Self {
        Self::Array(array)
    }
}

/// The type and the value, on one short line: `u32 7`, `string "llama"`, `array of 3 f32`.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.value_type().name();
        match self {
            Self::String(text) => write!(f, "{name} \"{}\"", Shown::cut(text, 40)),
            Self::Bool(value) => write!(f, "{name} {value}"),
            Self::Array(array) => write!(f, "{name} of {} {}", array.len(), array.element_type().name()),
            Self::F32(x) => write!(f, "{name} {x}"),
            Self::F64(x) => write!(f, "{name} {x}"),
            other => write!(f, "{name} {}", other.as_integer().unwrap_or_default()),
        }
    }
}

/// A Rust type that a metadata value can be read as, with [`Gguf::get`](super::Gguf::get).
pub trait FromValue<'a>: Sized {
    /// What to call this type in an error.
    const WANTED: &'static str;

    /// The value as this type, if it is of that kind and fits.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! integers_from_value {
    ($($ty:ty, $one:literal, $many:literal;)*) => {$(
        impl FromValue<'_> for $ty {
            const WANTED: &'static str = $one;

            fn from_value(value: &Value) -> Option<Self> {
                value.as_integer()?.try_into().ok()
            }
        }

        impl FromValue<'_> for Vec<$ty> {
            const WANTED: &'static str = $many;

            fn from_value(value: &Value) -> Option<Self> {
                let Value::Array(array) = value else { return None };
                array.iter().map(|item| <$ty>::from_value(&item)).collect()
            }
        }
    )*};
}

integers_from_value! {
    u32, "u32", "array of u32";
    i32, "i32", "array of i32";
    u64, "u64", "array of u64";
    i64, "i64", "array of i64";
    usize, "unsigned integer", "array of unsigned integers";
}

impl FromValue<'_> for f32 {
    const WANTED: &'static str = "f32";

    fn from_value(value: &Value) -> Option<Self> {
        let wide = value.as_float()?;
        let narrow = wide as f32;
        (narrow.is_finite() || !wide.is_finite()).then_some(narrow)
    }
}

impl FromValue<'_> for f64 {
    const WANTED: &'static str = "f64";

    fn from_value(value: &Value) -> Option<Self> {
        value.as_float()
    }
}

impl FromValue<'_> for Vec<f32> {
    const WANTED: &'static str = "array of f32";

    fn from_value(value: &Value) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.iter().map(|item| f32::from_value(&item)).collect()
    }
}

impl FromValue<'_> for bool {
    const WANTED: &'static str = "bool";

    fn from_value(value: &Value) -> Option<Self> {
        if let Value::Bool(value) = value { Some(*value) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const WANTED: &'static str = "string";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::String(text) = value { Some(text) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a [String] {
    const WANTED: &'static str = "array of strings";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::Array(Array::String(texts)) = value { Some(texts) } else { None }
    }
}

impl<'a> FromValue<'a> for &'a Array {
    const WANTED: &'static str = "array";

    fn from_value(value: &'a Value) -> Option<Self> {
        if let Value::Array(array) = value { Some(array) } else { None }
    }
}
