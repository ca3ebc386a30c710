//! To which trace what is done belongs, and spans around it; and what a process counts of its work.
//!
//! A request names a trace in its header `traceparent`, or begins one. Whatever is appended while it
//! is worked on carries the trace on in the event's own `traceparent`; whoever takes the event up,
//! in whichever process, goes on with it. So it is also where spans are not recorded: there a trace
//! is passed on as it came, and nothing else is done or paid.
//!
//! What spans are named and what they say is for everybody who can read the traces: the names of
//! things, ids, codes and outcomes. No text that somebody else has written belongs in them, no
//! address with its query, and nothing of a body; so neither do records of the log.

pub mod figures;

use std::borrow::Cow;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use daybook_events::{Subject, TraceParent};
use opentelemetry::context::FutureExt as _;
use opentelemetry::global::{self, BoxedTracer};
use opentelemetry::trace::{
    Link, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _, TraceState, Tracer as _,
};
use opentelemetry::{Context, InstrumentationScope, SpanId, TraceFlags, TraceId};

pub use opentelemetry::{KeyValue, StringValue, Value};

/// The attribute of spans that came to nothing: whoever sends spans leaves them out.
pub const IDLE: &str = "daybook.idle";

/// Names of attributes. Those about HTTP are the ones that OpenTelemetry has for it.
pub mod attribute {
    /// The project, by its name.
    pub const PROJECT: &str = "daybook.project";
    /// The environment, by its name.
    pub const ENVIRONMENT: &str = "daybook.environment";
    /// The service, by its name.
    pub const SERVICE: &str = "daybook.service";
    /// The id of the deployment.
    pub const DEPLOYMENT: &str = "daybook.deployment.id";
    /// The id of the build.
    pub const BUILD: &str = "daybook.build.id";
    /// The cluster, by its name.
    pub const CLUSTER: &str = "daybook.cluster";
    /// The worker, by the name of its consumer.
    pub const WORKER: &str = "daybook.worker";
    /// The type of the event that woke a worker.
    pub const EVENT_TYPE: &str = "daybook.event.type";
    /// The position of an event.
    pub const EVENT_POSITION: &str = "daybook.event.position";
    /// How often the event was handed over.
    pub const ATTEMPT: &str = "daybook.attempt";
    /// What an activation came to.
    pub const OUTCOME: &str = "daybook.outcome";
    /// The id of the webhook.
    pub const WEBHOOK: &str = "daybook.webhook.id";
    /// The host that is asked, by name or address.
    pub const SERVER: &str = "server.address";
    /// The status of an answer.
    pub const STATUS: &str = "http.response.status_code";
}

static TRACER: OnceLock<BoxedTracer> = OnceLock::new();

/// From now on spans are recorded, by the provider that is OpenTelemetry's global one. To be called
/// once that is set.
pub fn record(version: &'static str) {
    TRACER.get_or_init(|| {
        let scope = InstrumentationScope::builder("daybook").with_version(version);
        global::tracer_with_scope(scope.build())
    });
}

/// Whether spans are recorded in this process.
pub fn is_recording() -> bool {
    TRACER.get().is_some()
}

/// What became of the spans of this process. All zero where none are recorded.
#[derive(Debug, Default)]
pub struct Figures {
    /// Spans that were handed to whoever collects them.
    pub sent: AtomicU64,
    /// Spans that were dropped because too many waited.
    pub overflowed: AtomicU64,
    /// Spans that were dropped because nobody took them.
    pub refused: AtomicU64,
    /// Spans that wait, or are on their way.
    pub waiting: AtomicU64,
}

/// What became of the spans of this process.
pub fn figures() -> &'static Figures {
    static FIGURES: OnceLock<Figures> = OnceLock::new();
    FIGURES.get_or_init(Figures::default)
}

/// How a span stands to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A request of somebody else is answered.
    Server,
    /// An event is taken up.
    Consumer,
    /// Somebody else is asked.
    Client,
    /// None of these.
    Internal,
}

impl From<Kind> for SpanKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Server => Self::Server,
            Kind::Consumer => Self::Consumer,
            Kind::Client => Self::Client,
            Kind::Internal => Self::Internal,
        }
    }
}

/// Whether anything came of a unit of work.
#[derive(Debug)]
struct Touched(AtomicBool);

/// A unit of work in a trace. Its span, if spans are recorded, ends with it.
#[derive(Debug)]
pub struct Work {
    context: Context,
    touched: Option<Arc<Touched>>,
}

impl Work {
    /// Begins a unit of work in the trace of `parent`. Without one it begins a trace of its own,
    /// where spans are recorded. `about` is only asked if they are.
    pub fn begin(
        name: impl Into<Cow<'static, str>>,
        kind: Kind,
        parent: Option<TraceParent>,
        about: impl FnOnce() -> Vec<KeyValue>,
    ) -> Self {
        Self::linked(name, kind, parent, None, about)
    }

    /// The same, with a link to what else led to it.
    pub fn linked(
        name: impl Into<Cow<'static, str>>,
        kind: Kind,
        parent: Option<TraceParent>,
        link: Option<TraceParent>,
        about: impl FnOnce() -> Vec<KeyValue>,
    ) -> Self {
        // What surrounds it is nothing to it: it may be of another trace.
        let passed = Self::pass_on(parent);
        let Some(tracer) = TRACER.get() else {
            return passed;
        };
        let outside = passed.context;
        let mut builder = SpanBuilder::from_name(name)
            .with_kind(kind.into())
            .with_attributes(about());
        if let Some(link) = link {
            builder = builder.with_links(vec![Link::with_context(place(link))]);
        }
        let span = tracer.build_with_context(builder, &outside);
        let touched = Arc::new(Touched(AtomicBool::new(false)));
        Self {
            context: outside.with_span(span).with_value(touched.clone()),
            touched: Some(touched),
        }
    }

    /// Passes a trace on without a span of its own.
    pub fn pass_on(parent: Option<TraceParent>) -> Self {
        let context = Context::new();
        Self {
            context: match parent {
                Some(parent) => context.with_remote_span_context(place(parent)),
                None => context,
            },
            touched: None,
        }
    }

    /// Does the work: what is appended in it belongs to its trace.
    pub async fn run<F: Future>(&self, work: F) -> F::Output {
        work.with_context(self.context.clone()).await
    }

    /// Its place in its trace: what follows on it belongs there. None if it is in no trace.
    pub fn place(&self) -> Option<TraceParent> {
        place_in(&self.context)
    }

    /// Adds to what its span says.
    pub fn say(&self, attribute: KeyValue) {
        self.context.span().set_attribute(attribute);
    }

    /// It did not work, for a reason with this code.
    pub fn fail(&self, code: impl Into<Cow<'static, str>>) {
        fail(&self.context, code.into());
    }

    /// Whether anything came of it that others may want to know of.
    pub fn is_touched(&self) -> bool {
        let touched = self.touched.as_ref();
        touched.is_some_and(|t| t.0.load(Ordering::Relaxed))
    }

    /// Nothing came of it: its span is left out.
    pub fn leave_out(&self) {
        self.say(KeyValue::new(IDLE, true));
    }
}

fn fail(context: &Context, code: Cow<'static, str>) {
    let span = context.span();
    span.set_attribute(KeyValue::new("error.type", code.clone().into_owned()));
    span.set_status(Status::error(code));
}

fn place(parent: TraceParent) -> SpanContext {
    SpanContext::new(
        TraceId::from_bytes(parent.trace()),
        SpanId::from_bytes(parent.span()),
        TraceFlags::default().with_sampled(parent.is_sampled()),
        true,
        TraceState::NONE,
    )
}

fn place_in(context: &Context) -> Option<TraceParent> {
    let span = context.span();
    let place = span.span_context();
    TraceParent::new(
        place.trace_id().to_bytes(),
        place.span_id().to_bytes(),
        place.is_sampled(),
    )
}

/// The place of the unit of work that this is a part of, if it is in a trace.
pub fn current() -> Option<TraceParent> {
    Context::map_current(place_in)
}

/// Does a part of a unit of work that takes its time, with a span of its own.
pub async fn part<F: Future>(name: &'static str, work: F) -> F::Output {
    let Some(tracer) = TRACER.get() else {
        return work.await;
    };
    // All else stays as it is: what comes of the part comes of the whole.
    let whole = Context::current();
    let span = tracer.build_with_context(SpanBuilder::from_name(name), &whole);
    work.with_context(whole.with_span(span)).await
}

/// Asks a host for something, as a part of a unit of work, with a span of its own that names the
/// host, and the code of what went wrong. What is asked outside of any trace has none.
pub async fn request<T, E, F>(
    name: &'static str,
    host: &str,
    work: F,
    code: fn(&E) -> &'static str,
) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let Some(tracer) = TRACER.get() else {
        return work.await;
    };
    let whole = Context::current();
    if !whole.span().span_context().is_valid() {
        return work.await;
    }
    // The span of the whole must not be left out: this one would follow on nothing.
    touched(&whole);
    let builder = SpanBuilder::from_name(name)
        .with_kind(SpanKind::Client)
        .with_attributes([KeyValue::new(attribute::SERVER, host.to_owned())]);
    let span = tracer.build_with_context(builder, &whole);
    let mut asked = Asked {
        context: whole.with_span(span),
        is_over: false,
    };
    let result = work.with_context(asked.context.clone()).await;
    asked.is_over = true;
    if let Err(error) = &result {
        fail(&asked.context, code(error).into());
    }
    result
}

/// A request that is under way.
struct Asked {
    context: Context,
    is_over: bool,
}

impl Drop for Asked {
    fn drop(&mut self) {
        // It took too long, or nobody wants it any more.
        if !self.is_over {
            fail(&self.context, "cancelled".into());
        }
    }
}

/// The host that is asked here has answered with this status of HTTP.
pub fn answered(status: u16) {
    if !is_recording() {
        return;
    }
    say(|| vec![KeyValue::new(attribute::STATUS, i64::from(status))]);
    if status >= 400 {
        failed(&status.to_string());
    }
}

/// The unit of work that something is a part of, to go on with it elsewhere. Its span ends when
/// nobody has it any more.
#[derive(Debug, Clone)]
pub struct Carrier(Context);

/// The unit of work that this is a part of.
pub fn carrier() -> Carrier {
    Carrier(Context::current())
}

impl Carrier {
    /// Does a part of it, on whatever thread this is.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        let _attached = self.0.clone().attach();
        work()
    }
}

/// The same work, as a part of the unit of work that this is a part of, on whatever thread it is done.
pub fn carried<T, F: FnOnce() -> T>(work: F) -> impl FnOnce() -> T + use<T, F> {
    let carrier = carrier();
    move || carrier.run(work)
}

/// What a span says of the aggregate that it is about.
pub fn about(subject: &Subject) -> Vec<KeyValue> {
    let mut all = Vec::with_capacity(3);
    if let Some(project) = subject.project() {
        all.push(KeyValue::new(attribute::PROJECT, project.to_string()));
    }
    match subject {
        Subject::Deployment(_, environment, id) => {
            let environment = environment.to_string();
            all.push(KeyValue::new(attribute::ENVIRONMENT, environment));
            all.push(KeyValue::new(attribute::DEPLOYMENT, id.to_string()));
        }
        Subject::Environment(_, environment) => {
            let environment = environment.to_string();
            all.push(KeyValue::new(attribute::ENVIRONMENT, environment));
        }
        Subject::Build(_, id) => all.push(KeyValue::new(attribute::BUILD, id.to_string())),
        _ => {}
    }
    all
}

/// Adds to what the span says of the unit of work that this is a part of. `attributes` are only
/// asked for where spans are recorded.
pub fn say(attributes: impl FnOnce() -> Vec<KeyValue>) {
    if is_recording() {
        Context::map_current(|context| context.span().set_attributes(attributes()));
    }
}

/// What the unit of work that this is a part of is about has failed, with this code: that was
/// recorded, and nothing is tried again.
pub fn failed(code: &str) {
    if is_recording() {
        Context::map_current(|context| fail(context, code.to_owned().into()));
    }
}

/// The unit of work that this is a part of has done something that leaves no event.
pub fn touch() {
    if is_recording() {
        Context::map_current(touched);
    }
}

fn touched(context: &Context) {
    if let Some(touched) = context.get::<Arc<Touched>>() {
        touched.0.store(true, Ordering::Relaxed);
    }
}

/// The unit of work that this is a part of has appended an event of this type (without the common
/// prefix) at this position.
pub fn appended(kind: &'static str, position: u64) {
    if !is_recording() {
        return;
    }
    Context::map_current(|context| {
        touched(context);
        let position = i64::try_from(position).unwrap_or(i64::MAX);
        let about = vec![KeyValue::new(attribute::EVENT_POSITION, position)];
        context.span().add_event(kind, about);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> TraceParent {
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            .parse()
            .unwrap()
    }

    /// Nothing is recorded in these tests, as in a process that sends its spans nowhere.
    #[tokio::test]
    async fn a_trace_is_passed_on_as_it_came() {
        assert_eq!(current(), None);
        let work = Work::begin("work", Kind::Consumer, Some(given()), || {
            unreachable!("nobody records it")
        });
        assert_eq!(work.place(), Some(given()));
        let seen = work
            .run(async {
                tokio::task::yield_now().await;
                appended("deployment.queued.v1", 1);
                current()
            })
            .await;
        assert_eq!(seen, Some(given()));
        assert!(!work.is_touched());
        assert_eq!(current(), None, "it ends with the work");
    }

    #[tokio::test]
    async fn a_trace_is_carried_to_other_threads() {
        let work = Work::pass_on(Some(given()));
        let seen = work
            .run(async {
                let elsewhere = tokio::task::spawn_blocking(carried(current)).await;
                let asking = async { Ok::<_, ()>(current()) };
                let asked = request("ask", "localhost", asking, |&()| "failed").await;
                (elsewhere.unwrap(), asked.unwrap())
            })
            .await;
        assert_eq!(seen, (Some(given()), Some(given())));
        let outside = tokio::task::spawn_blocking(current).await.unwrap();
        assert_eq!(outside, None);
    }

    #[tokio::test]
    async fn work_without_a_trace_is_in_none_whatever_surrounds_it() {
        let outer = Work::begin("outer", Kind::Internal, Some(given()), Vec::new);
        let inner = Work::begin("inner", Kind::Internal, None, Vec::new);
        let seen = outer.run(inner.run(async { current() })).await;
        assert_eq!(seen, None);
    }
}
