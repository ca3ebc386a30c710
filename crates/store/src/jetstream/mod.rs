//! The log and the lines on NATS JetStream.
//!
//! Works with nats-server 2.9 and every later version; what only newer servers have is used only
//! where they say that they are newer.

mod bulletin;
mod connection;
mod durability;
mod durable_consumer;
mod leader;
mod line_log;
mod log;
mod publish;
mod pull;
mod read;
mod stream_setup;

pub use bulletin::{BulletinOptions, JetStreamBulletin, NotPublished};
pub use connection::{ConnectError, Connection, NatsAuth, NatsOptions};
pub use line_log::{JetStreamLines, LineOptions};
pub use log::{JetStreamLog, LogOptions};
pub use stream_setup::{OpenError, SetAsideError, set_aside};
