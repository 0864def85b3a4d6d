//! What holds for the program and its workspace as a whole.

mod architecture;
