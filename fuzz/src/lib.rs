//! What the fuzz targets share: reading an input as a list of choices, an image of a disk, and an engine
//! that is driven by bytes.
//!
//! A target says what has to hold and panics if it does not. The ones that only parse take an input as it
//! is; the ones that run a sequence of operations read it through [`choices::Choices`].

pub mod choices;
pub mod image;
pub mod maps;
pub mod node;
pub mod shelf;
pub mod streams;
