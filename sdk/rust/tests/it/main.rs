//! The client against a stub server that answers as the API promises, and
//! sometimes breaks the promise.

mod calls;
mod stream;
mod stub;
