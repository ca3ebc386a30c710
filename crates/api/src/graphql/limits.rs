//! What a request may cost, looked at before it is carried out.
//!
//! A short document can mean a lot: brackets within brackets take the parser's stack, and fragments
//! that name fragments double with each step. So brackets are counted before a document is parsed,
//! and what its fragments come to before it is validated; the schema's own limits, which know how
//! long lists are, come after that.

use std::collections::HashMap;

use async_graphql::Name;
use async_graphql::parser::parse_query;
use async_graphql::parser::types::{
    DocumentOperations, ExecutableDocument, FragmentDefinition, OperationType, Selection,
    SelectionSet,
};
use async_graphql::{Positioned, Request, Response};
use axum::http::StatusCode;

use super::refusal;
use crate::problem::Problem;

/// Most bytes of a document.
const DOCUMENT: usize = 32 * 1024;
/// Most opening brackets of a document.
const BRACKETS: usize = 400;
/// Most fields of a document once its fragments are written out.
const FIELDS: usize = 2_000;
/// How deep fields may be nested. Tools that ask for the schema go to 15.
pub(super) const DEPTH: usize = 20;
/// How much may be asked for at once, about one for each value of an answer.
pub(super) const COMPLEXITY: usize = 20_000;
/// Most directives of one field.
pub(super) const DIRECTIVES: usize = 8;
/// Rows that a list has if it is not said how many.
pub(super) const FIRST: u32 = 20;
/// Most items of all lists of an answer together.
pub(super) const ITEMS: usize = 20_000;
/// Most states of the past that one request has worked out.
pub(super) const LOOKS_BACK: usize = 100;
/// What a search through the ledger costs, however little it finds.
const SEARCH: usize = 1_000;
/// What it costs to look back.
const BACK: usize = 2_000;

/// What a list of at most `first` items costs that cost `each`.
pub(super) fn page(first: Option<u32>, each: usize) -> usize {
    many(first.unwrap_or(FIRST), each)
}

/// What a page costs for which the ledger is searched.
pub(super) fn search(first: Option<u32>, each: usize) -> usize {
    SEARCH + page(first, each)
}

/// What a page costs that may be of the past.
pub(super) fn past(at: Option<&String>, first: Option<u32>, each: usize) -> usize {
    let back = if at.is_some() { BACK } else { 0 };
    back + page(first, each)
}

/// What a list costs that is whole if it is not said how many items it is to have, and usually has
/// about so many.
pub(super) fn list(first: Option<u32>, usually: u32, each: usize) -> usize {
    many(first.unwrap_or(usually), each)
}

/// What a list of about so many items costs that cost `each`.
pub(super) fn many(items: u32, each: usize) -> usize {
    // Sums of this stay far from an overflow.
    const MOST: usize = 1_000_000_000;
    let items = usize::try_from(items).unwrap_or(MOST);
    items.saturating_mul(each.saturating_add(1)).min(MOST)
}

/// What is to be done, as far as it matters before it is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) kind: OperationType,
    /// Fields of its first level.
    pub(super) fields: usize,
}

impl Operation {
    /// How many requests of a caller it counts for: each mutation of a document for itself.
    pub(super) fn requests(self) -> usize {
        match self.kind {
            OperationType::Mutation => self.fields.max(1),
            OperationType::Query | OperationType::Subscription => 1,
        }
    }
}

/// Parses the document of a request, if it is within the limits.
pub(super) fn parse(request: &mut Request) -> Result<Operation, Box<Response>> {
    let (document, operations) = check(&request.query)?;
    request.set_parsed_query(document);
    let wanted = request.operation_name.as_deref();
    let mut fitting = operations
        .into_iter()
        .filter(|(name, _)| wanted.is_none_or(|wanted| name.as_deref() == Some(wanted)));
    // What names no operation, or one of several not clearly, is refused when it is carried out.
    let nothing = Operation {
        kind: OperationType::Query,
        fields: 0,
    };
    Ok(fitting.next().map_or(nothing, |(_, operation)| operation))
}

type Operations = Vec<(Option<String>, Operation)>;

fn check(text: &str) -> Result<(ExecutableDocument, Operations), Box<Response>> {
    let refuse = |code, detail: &str, remedy: &str| {
        let problem = Problem::new(StatusCode::BAD_REQUEST, code, detail, remedy);
        Err(Box::new(refusal::response(problem)))
    };
    if text.trim().is_empty() {
        return refuse(
            "query_missing",
            "the request has no query",
            "send a JSON object with a GraphQL document as \"query\"",
        );
    }
    let brackets = text.bytes().filter(|b| matches!(b, b'{' | b'[')).count();
    if text.len() > DOCUMENT || brackets > BRACKETS {
        return refuse(
            "query_too_large",
            "the document is larger than what is parsed",
            "ask in several requests, and send values as variables",
        );
    }
    let document = parse_query(text).map_err(|e| {
        let mut response = Response::from_errors(vec![e.into()]);
        for error in &mut response.errors {
            let extensions = error.extensions.get_or_insert_default();
            extensions.set("code", "malformed_query");
            extensions.set("status", StatusCode::BAD_REQUEST.as_u16());
            extensions.set("remedy", "send a GraphQL document");
            extensions.set("retryable", false);
        }
        Box::new(response)
    })?;
    let mut sizes = Sizes {
        fragments: &document.fragments,
        known: HashMap::new(),
    };
    match sizes.document(&document.operations) {
        Some(Size { fields, depth, .. }) if fields <= FIELDS && depth <= DEPTH => {
            let operations = sizes.operations(&document.operations);
            Ok((document, operations))
        }
        Some(Size { depth, .. }) if depth > DEPTH => refuse(
            "query_too_deep",
            "the document is nested deeper than what is answered",
            "ask in several requests",
        ),
        Some(_) => refuse(
            "query_too_complex",
            "the document asks for more fields than what is answered at once",
            "ask in several requests",
        ),
        None => refuse(
            "invalid_query",
            "a fragment contains itself",
            "break the circle",
        ),
    }
}

/// What a part of a document comes to.
#[derive(Debug, Clone, Copy, Default)]
struct Size {
    fields: usize,
    depth: usize,
    /// Fields of the first level.
    first: usize,
}

impl Size {
    fn and(self, other: Self) -> Self {
        Self {
            fields: self.fields.saturating_add(other.fields),
            depth: self.depth.max(other.depth),
            first: self.first.saturating_add(other.first),
        }
    }
}

struct Sizes<'a> {
    fragments: &'a HashMap<Name, Positioned<FragmentDefinition>>,
    /// None while it is being looked at.
    known: HashMap<&'a str, Option<Size>>,
}

impl<'a> Sizes<'a> {
    /// All operations and fragments together; none if fragments go in a circle.
    fn document(&mut self, operations: &'a DocumentOperations) -> Option<Size> {
        let mut size = Size::default();
        for (_, operation) in operations.iter() {
            size = size.and(self.set(&operation.node.selection_set.node, 0)?);
        }
        for name in self.fragments.keys() {
            size = size.and(self.fragment(name, 0)?);
        }
        Some(size)
    }

    /// Each operation by itself.
    fn operations(&mut self, operations: &'a DocumentOperations) -> Operations {
        let mut found = Vec::new();
        for (name, operation) in operations.iter() {
            let size = self.set(&operation.node.selection_set.node, 0);
            let operation = Operation {
                kind: operation.node.ty,
                fields: size.unwrap_or_default().first,
            };
            found.push((name.map(ToString::to_string), operation));
        }
        found
    }

    fn set(&mut self, set: &'a SelectionSet, level: usize) -> Option<Size> {
        let mut size = Size::default();
        for item in &set.items {
            let one = match &item.node {
                Selection::Field(field) => {
                    let inner = self.set(&field.node.selection_set.node, level + 1)?;
                    Size {
                        fields: inner.fields.saturating_add(1),
                        depth: inner.depth + 1,
                        first: 1,
                    }
                }
                Selection::InlineFragment(fragment) => {
                    self.set(&fragment.node.selection_set.node, level + 1)?
                }
                Selection::FragmentSpread(spread) => {
                    self.fragment(spread.node.fragment_name.node.as_str(), level + 1)?
                }
            };
            size = size.and(one);
        }
        Some(size)
    }

    fn fragment(&mut self, name: &str, level: usize) -> Option<Size> {
        // A fragment that is not there is for the validation to name.
        let Some((name, fragment)) = self.fragments.get_key_value(name) else {
            return Some(Size::default());
        };
        if let Some(known) = self.known.get(name.as_str()) {
            return *known;
        }
        // Deeper than any document that is answered: its depth says so, wherever it is cut off.
        if level > BRACKETS {
            return Some(Size {
                depth: BRACKETS,
                ..Size::default()
            });
        }
        self.known.insert(name.as_str(), None);
        let size = self.set(&fragment.node.selection_set.node, level)?;
        self.known.insert(name.as_str(), Some(size));
        Some(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(document: &str) -> Option<String> {
        let response = check(document).err()?;
        let code = response.errors[0].extensions.as_ref()?.get("code").cloned();
        code.and_then(|c| match c {
            async_graphql::Value::String(code) => Some(code),
            _ => None,
        })
    }

    #[test]
    fn what_people_send_is_let_through() {
        assert_eq!(code("{ projects { name } }"), None);
        assert_eq!(
            code("query A { projects { ...P } } fragment P on Project { name }"),
            None
        );
    }

    #[test]
    fn mutations_count_one_by_one_also_in_fragments() {
        let requests = |text: &str, name: Option<&str>| {
            let mut request = Request::new(text);
            request.operation_name = name.map(str::to_owned);
            parse(&mut request).unwrap().requests()
        };
        assert_eq!(requests("{ a b c }", None), 1);
        assert_eq!(requests("mutation { a b: a c { d e } }", None), 3);
        let document = "query Q { a } mutation M { ...F ... on Mutation { x y { z } } } \
                        fragment F on Mutation { a ...G } fragment G on Mutation { b c: b }";
        assert_eq!(requests(document, Some("M")), 5);
        assert_eq!(requests(document, Some("Q")), 1);
        assert_eq!(requests(document, Some("none")), 1);
        assert_eq!(requests("subscription { a b }", None), 1);
    }

    #[test]
    fn fragments_count_with_all_that_they_come_to() {
        // Each fragment names the next one twice: some hundred bytes, a billion fields.
        let mut bomb = String::from("{ ...f0 }");
        for n in 0..30 {
            let next = n + 1;
            bomb.push_str(&format!(
                " fragment f{n} on Query {{ a: __typename ...f{next} b: __typename ...f{next} }}"
            ));
        }
        bomb.push_str(" fragment f30 on Query { __typename }");
        assert_eq!(code(&bomb).as_deref(), Some("query_too_complex"));
    }

    #[test]
    fn circles_and_long_chains_of_fragments_end() {
        let circle = "{ ...a } fragment a on Query { ...b } fragment b on Query { ...a }";
        assert_eq!(code(circle).as_deref(), Some("invalid_query"));
        let mut chain = String::from("{ ...f0 }");
        for n in 0..390 {
            let next = n + 1;
            chain.push_str(&format!(" fragment f{n} on Q {{ x {{ ...f{next} }} }}"));
        }
        assert_eq!(code(&chain).as_deref(), Some("query_too_large"));
        let chain: String = (0..190)
            .map(|n| format!(" fragment f{n} on Q {{ x {{ ...f{} }} }}", n + 1))
            .collect();
        assert_eq!(
            code(&format!("{{ ...f0 }}{chain}")).as_deref(),
            Some("query_too_deep")
        );
    }

    #[test]
    fn brackets_do_not_take_the_stack() {
        for open in ["{a", "{a(b:[", "{a(b:{c:"] {
            let endless = open.repeat(20_000);
            assert_eq!(code(&endless).as_deref(), Some("query_too_large"));
            // As many as are parsed: refused or not, the parser comes back.
            let most = open.repeat(BRACKETS / open.matches(['{', '[']).count());
            assert!(code(&most).is_some());
        }
        assert_eq!(code("").as_deref(), Some("query_missing"));
        assert_eq!(code("{").as_deref(), Some("malformed_query"));
    }
}
