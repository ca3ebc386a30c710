//! The OpenAPI document: routes from their handlers, schemas from the types that are sent.

use daybook_events::lines::Line;
use daybook_events::routing::records::TTL_MAX;
use schemars::{JsonSchema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};
use utoipa::openapi::schema::{Object, Schema};
use utoipa::openapi::{InfoBuilder, License, OpenApi, OpenApiBuilder, RefOr};
use utoipa::{PartialSchema, ToSchema};

use crate::problem::{self, ProblemDocument};
use crate::{commands, routes, state, tlog, view};

/// The document without its schemas and without what all routes have in common.
pub(crate) fn frame() -> OpenApi {
    let mut license = License::new("Apache-2.0");
    license.identifier = Some("Apache-2.0".into());
    OpenApiBuilder::new()
        .info(
            InfoBuilder::new()
                .title("Daybook")
                .version(env!("CARGO_PKG_VERSION"))
                .description(Some(
                    "An event-sourced deployment ledger. Commands append events; answers are \
                     folds of them, and say in `Daybook-Position` up to which event.",
                ))
                .license(Some(license))
                .build(),
        )
        .build()
}

/// The OpenAPI 3.1 document of the whole interface, as `/openapi.json` serves it.
pub fn openapi() -> Value {
    complete(routes::described().1)
}

/// Puts in the schemas, and what every route accepts and answers.
pub(crate) fn complete(document: OpenApi) -> Value {
    // A document made of strings, maps and lists can always be written.
    let mut document = serde_json::to_value(document).unwrap_or_default();
    let schemas = with_enumerations(with_named_variants(schemas()));
    if let Some(paths) = document["paths"].as_object_mut() {
        for (path, operations) in paths {
            let Some(operations) = operations.as_object_mut() else {
                continue;
            };
            for (method, operation) in operations {
                if let Some(operation) = operation.as_object_mut() {
                    describe_parameters(path, operation);
                    common(path, method, operation);
                }
            }
        }
    }
    // Servers on loopback may ask nobody.
    document["security"] = json!([{ "token": [] }, {}]);
    document["components"] = json!({
        "schemas": schemas,
        "securitySchemes": { "token": {
            "type": "http",
            "scheme": "bearer",
            "description": "A token of Daybook (`daybook_…`), or one of the identity provider that \
                the server is set up with. GET /api/v1/whoami says what it may do."
        } },
        "parameters": parameters(),
        "headers": headers(),
        "responses": { "Problem": {
            "description": "The request is refused or failed.",
            "content": { problem::MEDIA_TYPE: {
                "schema": { "$ref": "#/components/schemas/Problem" }
            } }
        } }
    });
    document
}

fn describe_parameters(path: &str, operation: &mut Map<String, Value>) {
    let parameters = operation
        .get_mut("parameters")
        .and_then(Value::as_array_mut);
    for described in parameters.into_iter().flatten() {
        // A parameter that is not given is not there at all.
        if let Some(types) = described["schema"]["type"].as_array() {
            let other = types.iter().find(|t| *t != "null").cloned();
            described["schema"]["type"] = other.unwrap_or_default();
        }
        let typed = &described["schema"]["type"];
        if typed != "string" && typed != "integer" {
            continue;
        }
        let of_lines = path.ends_with("/logs");
        let known = match described["name"].as_str() {
            Some("after") if of_lines => {
                Some(json!({ "type": "string", "pattern": CURSOR_OF_LINES }))
            }
            Some("cursor") if of_lines => {
                Some(json!({ "type": "string", "pattern": CURSOR_OF_SEARCH }))
            }
            // Instances are listed by name.
            Some("cursor") if path == "/api/v1/state" => parameter("instance_id"),
            name => name.and_then(parameter),
        };
        if let Some(known) = known {
            described["schema"] = known;
        }
    }
}

/// What a parameter of this name is, wherever routes take one as text.
fn parameter(name: &str) -> Option<Value> {
    let reference = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    Some(match name {
        "project" => reference("ProjectName"),
        "environment" => reference("EnvironmentName"),
        "service" => reference("ServiceName"),
        "cluster" => reference("ClusterName"),
        "template" => reference("TemplateName"),
        "freeze" => reference("FreezeName"),
        "hook" => reference("HookName"),
        "hostname" => reference("Hostname"),
        "commit" => reference("CommitId"),
        "id" | "deployment" => reference("DeploymentId"),
        "webhook" => reference("SubscriptionId"),
        "token" => reference("TokenId"),
        "instance_id" => json!({ "type": "string", "pattern": INSTANCE }),
        "repository" => json!({ "type": "string", "pattern": REPOSITORY }),
        "cursor" => json!({ "type": "string", "pattern": "^c1-[0-9a-f]{1,16}$" }),
        "limit" => json!({ "type": "integer", "minimum": 1, "maximum": 500 }),
        "after" | "to" => json!({ "type": "string", "pattern": POSITION }),
        "from" | "until" => json!({ "type": "string", "format": "date-time" }),
        "at" => json!({ "anyOf": [
            { "type": "string", "pattern": POSITION }, { "type": "string", "format": "date-time" }
        ] }),
        "correlation" => json!({ "type": "string", "format": "uuid" }),
        "chain" => json!({ "type": "string", "pattern": "^[0-9a-f]{64}$" }),
        "ttl" => json!({ "type": "integer", "minimum": 1, "maximum": TTL_MAX }),
        "provider" => reference("DnsProvider"),
        "regions" | "health_checks" => json!({ "type": "string", "pattern": PAIRS }),
        "outcome" => reference("Outcome"),
        "q" => json!({ "type": "string", "minLength": 1 }),
        "If-Match" => json!({ "type": "string", "pattern": ENTITY_TAGS }),
        _ => return None,
    })
}

/// `*`, or one entity tag or several.
const ENTITY_TAGS: &str = r#"^(\*|(W/)?"[!#-~]*"( ?, ?(W/)?"[!#-~]*")*)$"#;
/// A position, in figures.
const POSITION: &str = "^[0-9]{1,15}$";
/// The cursor of a line, or of a build's lines and a deployment's.
const CURSOR_OF_LINES: &str = "^((all|[0-9]{1,15})-)?[0-9]{1,15}$";
/// Where a search through lines goes on.
const CURSOR_OF_SEARCH: &str = "^[0-9]{1,15}-[bd][0-9]{1,15}$";
/// `project.environment.service`, each a DNS label of at most 30 characters.
const INSTANCE: &str = r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?(\.[a-z]([a-z0-9-]{0,28}[a-z0-9])?){2}$";
/// Clusters with what is given for each, between commas.
const PAIRS: &str = r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?=[A-Za-z0-9-]{1,64}(,[a-z]([a-z0-9-]{0,28}[a-z0-9])?=[A-Za-z0-9-]{1,64})*$";
/// A project's GitOps repository.
const REPOSITORY: &str = r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?\.git$";

/// The same with unions of constants as enumerations, which more generators of clients understand.
/// What each constant means goes to the description of them all.
fn with_enumerations(mut schemas: Map<String, Value>) -> Map<String, Value> {
    for schema in schemas.values_mut() {
        let variants = schema.get("oneOf").and_then(Value::as_array);
        let constant = |v: &Value| {
            Some((
                v.get("const")?.as_str()?.to_owned(),
                v.get("description").cloned(),
            ))
        };
        let constants =
            variants.and_then(|all| all.iter().map(constant).collect::<Option<Vec<_>>>());
        let (Some(constants), Some(schema)) = (constants, schema.as_object_mut()) else {
            continue;
        };
        let mut text = schema
            .get("description")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        for (value, meaning) in &constants {
            if let Some(meaning) = meaning.as_ref().and_then(Value::as_str) {
                text.push_str(&format!("\n- `{value}`: {meaning}"));
            }
        }
        schema.remove("oneOf");
        schema.insert("type".to_owned(), "string".into());
        schema.insert(
            "enum".to_owned(),
            constants.into_iter().map(|(value, _)| value).collect(),
        );
        if !text.is_empty() {
            schema.insert("description".to_owned(), text.into());
        }
    }
    schemas
}

/// The same with a name for what each variant of a tagged union holds: `GitVersion` for `git` of
/// `Version`. Generators of clients make types of names, and some refuse what has none.
fn with_named_variants(mut schemas: Map<String, Value>) -> Map<String, Value> {
    let mut named = Vec::new();
    for (union, schema) in &mut schemas {
        let variants = schema.get_mut("oneOf").and_then(Value::as_array_mut);
        for variant in variants.into_iter().flatten() {
            let properties = variant.get_mut("properties");
            let Some(properties) = properties.and_then(Value::as_object_mut) else {
                continue;
            };
            if properties.len() != 1 {
                continue;
            }
            for (tag, held) in properties {
                if held["type"] == "object" {
                    let name = format!("{}{union}", capitalised(tag));
                    let reference = json!({ "$ref": format!("#/components/schemas/{name}") });
                    named.push((name, std::mem::replace(held, reference)));
                }
            }
        }
    }
    for (name, schema) in named {
        schemas.entry(name).or_insert(schema);
    }
    schemas
}

/// `snake_case` as `CamelCase`.
fn capitalised(tag: &str) -> String {
    tag.split('_')
        .map(|word| {
            let mut letters = word.chars();
            let first = letters.next().map(|c| c.to_ascii_uppercase());
            first.into_iter().chain(letters).collect::<String>()
        })
        .collect()
}

fn common(path: &str, method: &str, operation: &mut Map<String, Value>) {
    let versioned = path.starts_with("/api/");
    let mut more = Vec::new();
    if versioned {
        more.push("MinPosition");
        if method != "get" {
            more.extend(["Actor", "IdempotencyKey"]);
        }
    }
    let parameters = operation
        .entry("parameters")
        .or_insert_with(|| json!([]))
        .as_array_mut();
    if let Some(parameters) = parameters {
        let reference = |name| json!({ "$ref": format!("#/components/parameters/{name}") });
        parameters.extend(more.into_iter().map(reference));
    }
    let Some(responses) = operation
        .get_mut("responses")
        .and_then(Value::as_object_mut)
    else {
        return;
    };
    if versioned {
        for response in responses.values_mut() {
            let mut headers = json!({
                "Daybook-Position": { "$ref": "#/components/headers/Position" },
                "Daybook-State-Hash": { "$ref": "#/components/headers/StateHash" },
                "Daybook-Tree-Size": { "$ref": "#/components/headers/TreeSize" },
                "Daybook-Tree-Root": { "$ref": "#/components/headers/TreeRoot" }
            });
            if method != "get" {
                headers["Idempotency-Replayed"] =
                    json!({ "$ref": "#/components/headers/IdempotencyReplayed" });
            }
            // Beside what the route itself says.
            let own = response["headers"].take();
            if let (Value::Object(own), Some(all)) = (own, headers.as_object_mut()) {
                all.extend(own);
            }
            response["headers"] = headers;
        }
    }
    if !path.starts_with("/git/") {
        for range in ["4XX", "5XX"] {
            responses.insert(
                range.into(),
                json!({ "$ref": "#/components/responses/Problem" }),
            );
        }
    }
}

fn parameters() -> Value {
    json!({
        "MinPosition": {
            "name": "Daybook-Min-Position", "in": "header", "required": false,
            "description": "Waits, within bounds, until this position is taken into account. \
                If that takes too long, the answer is 503 with the code `behind`; if the log ends far \
                before it, 409 with the code `position_ahead`, at once.",
            "schema": { "type": "integer", "minimum": 0 }
        },
        "Actor": {
            "name": "Daybook-Actor", "in": "header", "required": false,
            "description": "Who asks, where no credential is asked for: the name of an account, and \
                no personal data. Not checked, and without meaning where there is a credential.",
            "schema": { "type": "string", "pattern": "^[A-Za-z0-9._@-]{1,64}$", "default": "anonymous" }
        },
        "IdempotencyKey": {
            "name": "Idempotency-Key", "in": "header", "required": false,
            "description": "Carries the request out once, however often it is repeated with the \
                same key. The same key with another request is refused.",
            "schema": { "type": "string", "minLength": 1, "maxLength": 255 }
        }
    })
}

fn headers() -> Value {
    json!({
        "Position": {
            "description": "The answer takes every event up to this position into account.",
            "schema": { "type": "integer", "minimum": 0 }
        },
        "StateHash": {
            "description": "The hash over the states of all aggregates at exactly that position, \
                which a replay to it gives too. Missing while it is not at hand.",
            "schema": { "type": "string", "pattern": "^s3:[0-9a-f]{64}$" }
        },
        "TreeSize": {
            "description": "The newest signed head when the answer was made covers the events up \
                to this position. Missing where nothing is signed.",
            "schema": { "type": "integer", "minimum": 0 }
        },
        "TreeRoot": {
            "description": "The root of that head, as RFC 6962 hashes it.",
            "schema": { "type": "string", "pattern": "^[0-9a-f]{64}$" }
        },
        "IdempotencyReplayed": {
            "description": "`true` if an earlier request with the same key did it.",
            "schema": { "type": "string", "const": "true" }
        }
    })
}

/// Declares that these types, which describe themselves as JSON Schema, are sent or received.
/// The routes refer to them by name; [`schemas`] has what they are.
macro_rules! sent {
    ($($ty:ty),* $(,)?) => {
        $(
            impl PartialSchema for $ty {
                fn schema() -> RefOr<Schema> {
                    RefOr::T(Schema::Object(Object::new()))
                }
            }
            impl ToSchema for $ty {
                fn name() -> std::borrow::Cow<'static, str> {
                    <$ty as JsonSchema>::schema_name()
                }
            }
        )*

        fn schemas() -> Map<String, Value> {
            let mut settings = SchemaSettings::draft2020_12();
            settings.definitions_path = "/components/schemas".into();
            let mut generator = SchemaGenerator::new(settings);
            $( generator.subschema_for::<$ty>(); )*
            generator.subschema_for::<ProblemDocument<'_>>();
            generator.subschema_for::<Line>();
            generator.take_definitions(true)
        }
    };
}

sent! {
    routes::approvals::ApprovalList, routes::dora::DoraView, routes::search::FoundLines, routes::search::FoundLine,
    routes::templates::TemplateList, routes::templates::TemplateDetail,
    routes::templates::DeployFrom,
    routes::freezes::DefineFreeze, routes::freezes::FreezeGone, routes::freezes::FreezeList,
    view::FreezeView,
    view::AuditList, view::DeploymentAccepted, view::DeploymentDetail, view::DeploymentList,
    view::EnvironmentList, view::EnvironmentView, view::Health, view::HistoryList,
    view::InstanceDetail, view::InstanceList, view::MainSwitched, view::OperationAccepted,
    view::ProjectList, view::ProjectView, view::ProjectionsReport, view::ReadinessReport, view::SecretChanged,
    view::SecretList, view::SecretVerified, view::SecretsErased, view::ServiceList,
    view::ServiceView, view::StateView, state::Part, commands::RunOverrides,
    routes::events::EventPage, routes::events::FeedChainReport, routes::events::StoredEvent, routes::logs::LogLine,
    routes::gitops::GitopsView, routes::gitops::Decided, routes::gitops::SetRemote,
    routes::hooks::DefineHook, routes::hooks::DeliveryView, routes::hooks::HookList,
    routes::hooks::HookRemovedView, routes::hooks::HookView, routes::hooks::SetAutoDeploy,
    routes::attestation::SignedStatement, routes::cdevents::CdeventPage,
    routes::webhooks::CreateWebhook, routes::webhooks::ChangeWebhook,
    routes::webhooks::RotateWebhook, routes::webhooks::DeadLetterChoice,
    routes::webhooks::WebhookView, routes::webhooks::WebhookSecretView,
    routes::webhooks::WebhookList, routes::webhooks::WebhookGone, routes::webhooks::WebhookTest,
    routes::webhooks::WebhookStatus, routes::deliveries::DeliveryList,
    routes::config::ScaleTo, routes::config::ChangeConfig,
    routes::approvals::ApprovalDetail, routes::approvals::DecideOnPlan, routes::approvals::LetThrough,
    routes::projects::CreateProject, routes::projects::DefineService,
    routes::projects::CreateEnvironment, routes::projects::ChangeEnvironment,
    routes::projects::PatchEnvironment,
    routes::uploads::UploadView, routes::uploads::AskedObjects, routes::uploads::MissingObjects,
    routes::deployments::CreateDeployment, routes::deployments::Why,
    routes::deployments::MarkMain, routes::deployments::RedeployOptions,
    routes::deployments::RetryIn,
    routes::deployments::RollbackTo, routes::deployments::PromoteTo, routes::secrets::SetSecret, routes::secrets::VerifySecret,
    tlog::LedgerReport,
    routes::tokens::CreateToken, routes::tokens::RotateToken, routes::tokens::TokenMade,
    routes::tokens::TokenList, routes::tokens::TokenGone, routes::tokens::WhoAmI,
    routes::traffic::RouteList, routes::traffic::SetRoutes, routes::traffic::SetClusterPolicy,
    routes::traffic::RoutesAreSet, routes::records::RecordList, routes::domains::ClaimDomain, routes::domains::DomainList,
    routes::domains::DomainView, routes::domains::DomainGivenUp,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use schemars::schema_for;

    use super::*;

    /// The crate of the events writes the AsyncAPI document, and does not know these types.
    #[test]
    fn what_streams_send_is_in_the_asyncapi_document_as_it_is_sent() {
        let document = daybook_events::asyncapi::asyncapi("1.2.3");
        let members = |schema: &Value| -> BTreeSet<String> {
            let all = schema["properties"].as_object();
            all.into_iter().flat_map(|o| o.keys().cloned()).collect()
        };
        let required = |schema: &Value| -> BTreeSet<String> {
            let all = schema["required"].as_array().into_iter().flatten();
            all.filter_map(|name| Some(name.as_str()?.to_owned()))
                .collect()
        };
        for (name, sent, more) in [
            ("stream.line", schema_for!(routes::logs::LogLine), None),
            (
                "stream.try",
                schema_for!(routes::deliveries::DeliveryTry),
                None,
            ),
            (
                "stream.event",
                schema_for!(routes::events::StoredEvent),
                Some("chain"),
            ),
        ] {
            let sent = sent.to_value();
            let described = &document["components"]["schemas"][name];
            let with = |mut names: BTreeSet<String>| {
                names.extend(more.map(str::to_owned));
                names
            };
            assert_eq!(members(described), with(members(&sent)), "{name}");
            assert_eq!(required(described), with(required(&sent)), "{name}");
        }
    }
}
