//! An answer as it is made.

use std::collections::VecDeque;
use std::fmt;
use std::future::{poll_fn, Future};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{sleep_until, Instant, Sleep};

use crate::answer::Sum;
use crate::error::Error;
use crate::sse::Parser;
use crate::transport::Begun;
use crate::wire::Body;
use crate::{failures, wire, Answer, Client, Event, Result};

/// Bytes of a line of a stream, and of an event's data.
const LONGEST_LINE: usize = 16 << 20;
/// After the end of the stream, its body should end too, so that the connection can be used again.
const LONGEST_TAIL: usize = 64 << 10;
const TAIL_TIMEOUT: Duration = Duration::from_secs(1);

type Bytestream = Pin<Box<dyn futures_core::Stream<Item = reqwest::Result<Bytes>> + Send>>;

/// The events of an answer, as they come. **Dropping it cancels**: the connection closes, and the gateway stops.
///
/// It is a [`futures_core::Stream`]; its own [`next`](Stream::next) needs no other crate. An error ends it. What is not
/// polled is not read, so that a slow reader slows the gateway, and nothing piles up between.
#[must_use = "dropping a stream cancels the request"]
pub struct Stream {
    client: Client,
    url: String,
    request_id: Option<String>,
    /// `None` after the end.
    body: Option<Bytestream>,
    parser: Parser,
    /// From one event of the wire.
    pending: VecDeque<Event>,
    sum: Sum,
    timeout: Pin<Box<Sleep>>,
    /// Runs only while the stream is waited for: a reader that does something else is no silence of the gateway.
    silence: Pin<Box<Sleep>>,
    is_waiting: bool,
    /// After `[DONE]`: bytes that may still be thrown away.
    tail: Option<usize>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = out.debug_struct("Stream");
        shown.field("request_id", &self.request_id).finish_non_exhaustive()
    }
}

impl Stream {
    pub(crate) fn new(begun: Begun, client: Client, url: String, deadline: Instant) -> Self {
        let mut sum = Sum::default();
        sum.answer.request_id.clone_from(&begun.request_id);
        let mut parser = Parser::new(LONGEST_LINE);
        parser.feed(&begun.first.unwrap_or_default());
        Self {
            client,
            url,
            request_id: begun.request_id,
            body: Some(Box::pin(begun.response.bytes_stream())),
            parser,
            pending: VecDeque::new(),
            sum,
            timeout: Box::pin(sleep_until(deadline)),
            silence: Box::pin(sleep_until(deadline)),
            is_waiting: false,
            tail: None,
        }
    }

    /// The next event; `None` after the end.
    pub async fn next(&mut self) -> Option<Result<Event>> {
        poll_fn(|context| self.poll_event(context)).await
    }

    /// What the events that came add up to; after the end, the whole answer.
    pub fn answer(&self) -> &Answer {
        &self.sum.answer
    }

    /// The same, without a copy.
    pub fn into_answer(self) -> Answer {
        self.sum.answer
    }

    /// Names the request in the gateway's logs.
    pub fn request_id(&self) -> Option<&str> {
        self.request_id.as_deref()
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Event>>> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Poll::Ready(Some(self.give(event)));
            }
            if self.body.is_none() {
                return Poll::Ready(None);
            }
            if self.tail.is_none() {
                match self.parser.next() {
                    Ok(Some(data)) => {
                        if let Err(error) = self.take(&data) {
                            return Poll::Ready(Some(Err(self.fail(error))));
                        }
                        continue;
                    }
                    Ok(None) => {}
                    Err(_) => {
                        let message = format!("a line or event of {} is longer than {LONGEST_LINE} bytes", self.url);
                        return Poll::Ready(Some(Err(self.fail(Error::of(Error::UnexpectedAnswer, message)))));
                    }
                }
            }
            match self.poll_bytes(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(bytes)) => self.take_bytes(&bytes),
                Poll::Ready(Err(_)) if self.tail.is_some() => self.body = None,
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(self.fail(error)))),
            }
        }
    }

    /// More of the body, or why there is none.
    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<Result<Bytes>> {
        let Some(body) = &mut self.body else {
            return Poll::Pending;
        };
        if self.timeout.as_mut().poll(context).is_ready() {
            let message = "the timeout passed before the stream's end; `partial` has what came";
            return Poll::Ready(Err(Error::of(Error::TimedOut, message)));
        }
        let interrupted = |why: &str| {
            let message = format!("the stream of {} {why}; ask again: `partial` has what came", self.url);
            Poll::Ready(Err(Error::of(Error::Interrupted, message)))
        };
        let idle_timeout = self.client.inner().idle_timeout;
        match body.as_mut().poll_next(context) {
            Poll::Ready(Some(Ok(bytes))) => {
                self.is_waiting = false;
                Poll::Ready(Ok(bytes))
            }
            Poll::Ready(Some(Err(_))) => interrupted("broke: the gateway, or a proxy before it, went away"),
            Poll::Ready(None) => interrupted("ended without its end: the gateway, or a proxy before it, went away"),
            Poll::Pending => {
                if !self.is_waiting {
                    self.is_waiting = true;
                    let patience = if self.tail.is_some() { TAIL_TIMEOUT } else { idle_timeout };
                    self.silence.as_mut().reset(Instant::now() + patience);
                }
                if self.silence.as_mut().poll(context).is_ready() {
                    let why = format!("was silent for longer than the idle_timeout, {} s", idle_timeout.as_secs_f64());
                    return interrupted(&why);
                }
                Poll::Pending
            }
        }
    }

    fn take_bytes(&mut self, bytes: &[u8]) {
        match self.tail {
            None => self.parser.feed(bytes),
            Some(left) => match left.checked_sub(bytes.len()) {
                None => self.body = None,
                rest => self.tail = rest,
            },
        }
    }

    /// The data of an event of the wire.
    fn take(&mut self, data: &str) -> Result<()> {
        if data == "[DONE]" {
            self.tail = Some(LONGEST_TAIL);
            return Ok(());
        }
        if data.is_empty() {
            return Ok(());
        }
        let body: Body = wire::parse(data.as_bytes()).map_err(|why| failures::another_shape(&self.url, &why, None))?;
        let events = body.into_events(&mut self.sum.answer);
        let events = events.map_err(|error| failures::of_event(error, self.client.inner().key.as_deref()))?;
        self.pending.extend(events);
        Ok(())
    }

    fn give(&mut self, event: Event) -> Result<Event> {
        self.sum.add(&event);
        let most = self.client.inner().max_answer_bytes;
        if self.sum.size > most {
            return Err(self.fail(failures::too_long(&self.url, most)));
        }
        Ok(event)
    }

    /// Ends the stream. Its connection closes.
    fn fail(&mut self, mut error: Error) -> Error {
        self.body = None;
        self.pending.clear();
        let details = error.details_mut();
        details.request_id.clone_from(&self.request_id);
        details.partial = Some(self.sum.answer.clone());
        error
    }
}

impl futures_core::Stream for Stream {
    type Item = Result<Event>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_event(context)
    }
}
