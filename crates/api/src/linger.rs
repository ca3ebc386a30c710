//! What a client still sends while it is refused already.
//!
//! Many clients read nothing before they have sent all. Closing a connection while there is something unread on it
//! throws away the answer, too: such a client would see that it broke off, and never why. So what is left of the body is
//! read and thrown away before the answer goes out, within bounds.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Request;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::EXPECT;
use tokio::sync::oneshot;

/// How much is read of what nobody wants.
const UNWANTED_MAX: u64 = 16 * 1024 * 1024;
/// How long that is done,
const READ_WITHIN: Duration = Duration::from_secs(20);
/// and how long nothing may come meanwhile: who sends nothing gets the answer then.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// The body of a request, which comes back when it is dropped before its end.
pub(crate) struct Lent {
    body: Option<Incoming>,
    is_begun: bool,
    back: Option<oneshot::Sender<Unread>>,
}

struct Unread {
    body: Incoming,
    /// Whether somebody has asked for some of it.
    is_begun: bool,
}

/// Where a body comes back to.
pub(crate) struct Rest {
    back: oneshot::Receiver<Unread>,
    /// Whether the client sends nothing before it is told to go on.
    waits: bool,
}

/// Lends the body of a request.
pub(crate) fn lend(request: Request<Incoming>) -> (Request<Lent>, Rest) {
    let (sender, receiver) = oneshot::channel();
    let rest = Rest {
        back: receiver,
        waits: request.headers().contains_key(EXPECT),
    };
    let lent = request.map(|body| Lent {
        body: Some(body),
        is_begun: false,
        back: Some(sender),
    });
    (lent, rest)
}

impl Rest {
    /// Reads what is left, once there is an answer. What is still in use stays there; nor is anything
    /// read of what would not end within the bounds, or is not sent before somebody asks for it.
    pub(crate) async fn read(mut self) {
        let Ok(mut unread) = self.back.try_recv() else {
            return;
        };
        // Of a body whose length is known, that is how much of it is left.
        let is_too_long = unread.body.size_hint().lower() > UNWANTED_MAX;
        if is_too_long || (self.waits && !unread.is_begun) {
            return;
        }
        let mut left = UNWANTED_MAX;
        let reading = async {
            loop {
                let next = poll_fn(|cx| Pin::new(&mut unread.body).poll_frame(cx));
                let Ok(Some(Ok(frame))) = tokio::time::timeout(SILENCE_MAX, next).await else {
                    return;
                };
                let length = frame.data_ref().map_or(0, Bytes::len) as u64;
                match left.checked_sub(length) {
                    Some(less) => left = less,
                    None => return,
                }
            }
        };
        // However far it came: the answer goes out now.
        let _ = tokio::time::timeout(READ_WITHIN, reading).await;
    }
}

impl Body for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let lent = self.get_mut();
        lent.is_begun = true;
        match &mut lent.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let body = self.body.as_ref();
        body.map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take())
            && !body.is_end_stream()
        {
            let is_begun = self.is_begun;
            // Where nobody waits for it any more the connection is gone.
            let _ = back.send(Unread { body, is_begun });
        }
    }
}
