//! Starts the binary in a folder of its own, on free ports, and waits for states.

#![allow(
    dead_code,
    unused_imports,
    reason = "each module of the tests uses a part of it"
)]

mod connection;
mod http;
mod load;
mod picture;
mod process;
mod receiver;
mod search;
mod server;
mod source;
mod terminal;
mod watch;

pub use connection::Connection;
pub use daybook_testkit::browser::Browser;
pub use http::{Answer, request, request_with};
pub use load::{Expected, Load};
pub use picture::keep_picture;
pub use process::{Done, Folder, Process, Refused, daybook, processes_in, processes_of};
pub use receiver::{Received, Receiver};
pub use search::Search;
pub use server::{PATIENCE, Server, Settings, until};
pub use source::{application, replace_flags, site};
pub use terminal::{Terminal, without_colours};
pub use watch::Visitor;
