//! The suite against real providers, and against ones that are broken on purpose.

mod broken;
mod mock;
