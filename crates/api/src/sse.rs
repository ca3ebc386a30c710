//! Bodies that go on: frames are batched while a client is busy, idle streams show that they are
//! alive, and all end when the server does. A slow client holds up nobody but itself: what it is
//! sent next is read only when it has taken what came before.

use std::io;
use std::pin::Pin;
use std::time::Duration;

use crate::access::Lease;
use crate::metrics::OpenStream;
use axum::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{self, Stream, StreamExt};

/// The media type of server-sent events.
pub(crate) const MEDIA_TYPE: &str = "text/event-stream";

/// What a stream ends with that has come to its end. Without it a browser would connect again for ever.
pub(crate) const END: &[u8] = b"event: end\ndata: {}\n\n";

/// Frames that are written together at most.
const BATCH: usize = 64;

/// One server-sent event.
pub(crate) fn frame(id: &str, event: Option<&str>, data: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(data.len() + 96);
    frame.put_slice(b"id: ");
    frame.put_slice(id.as_bytes());
    if let Some(event) = event {
        frame.put_slice(b"\nevent: ");
        frame.put_slice(event.as_bytes());
    }
    // A line break in the data would end it: each line is a field of its own, and the receiver
    // puts them together again.
    for line in data.split(|b| *b == b'\n') {
        frame.put_slice(b"\ndata: ");
        frame.put_slice(line);
    }
    frame.put_slice(b"\n\n");
    frame.freeze()
}

/// What a stream of frames stands on.
pub(crate) struct Upkeep {
    /// Ends the stream, with the server or with the credential that it was opened with.
    pub(crate) lease: Lease,
    /// What is sent when nothing else was for some time.
    pub(crate) heartbeat: Option<(Duration, Bytes)>,
    /// Whether it is kept as a file: what ends it before its end is then an error of the body, as nobody
    /// could tell otherwise that a part is missing.
    pub(crate) whole: bool,
    /// Counts the stream while it is open.
    pub(crate) _open: OpenStream,
}

/// A body of frames.
pub(crate) fn body(
    frames: impl Stream<Item = Bytes> + Send + 'static,
    first: Bytes,
    upkeep: Upkeep,
) -> Body {
    type Chunks = Pin<Box<dyn Stream<Item = Vec<Bytes>> + Send>>;
    let chunks: Chunks = Box::pin(frames.ready_chunks(BATCH));
    let first = stream::iter((!first.is_empty()).then_some(first));
    let rest = stream::unfold(Some((chunks, upkeep)), |open| async move {
        let (mut chunks, upkeep) = open?;
        let idle = async {
            match &upkeep.heartbeat {
                Some((after, text)) => {
                    tokio::time::sleep(*after).await;
                    text.clone()
                }
                None => std::future::pending().await,
            }
        };
        let next = tokio::select! {
            biased;
            () = upkeep.lease.ended().cancelled() => {
                let cut = io::Error::new(io::ErrorKind::ConnectionAborted, "it was cut off");
                return upkeep.whole.then_some((Err(cut), None));
            }
            chunk = chunks.next() => chunk.map(|frames| match <[Bytes; 1]>::try_from(frames) {
                Ok([frame]) => frame,
                Err(frames) => frames.concat().into(),
            }),
            heartbeat = idle => Some(heartbeat),
        };
        next.map(|bytes| (Ok(bytes), Some((chunks, upkeep))))
    });
    Body::from_stream(first.map(Ok).chain(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_keeps_every_line_of_its_data() {
        let bytes = frame("7", Some("x.v1"), b"{\n}");
        assert_eq!(&bytes[..], b"id: 7\nevent: x.v1\ndata: {\ndata: }\n\n");
        assert_eq!(&frame("1", None, b"a")[..], b"id: 1\ndata: a\n\n");
    }
}
