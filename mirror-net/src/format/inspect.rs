//! Inspecting a disk.
