//! Who may use Daybook: given, when, then.
#![allow(clippy::unwrap_used)]

use daybook_events::access::{
    self, Access, AccessEvent, AccountName, Command, Grant, Projects, REVOKED_MAX, Role,
    TokenCreated, TokenId, TokenRevoked,
};
use daybook_events::testing::{Given, given};
use daybook_events::{Decision, Digest};

fn id(number: usize) -> TokenId {
    format!("{number:012x}").parse().unwrap()
}

fn grant(role: Role) -> Grant {
    Grant {
        role,
        projects: Projects::All,
    }
}

fn token(number: usize, name: &str, role: Role) -> TokenCreated {
    let name: AccountName = name.parse().unwrap();
    TokenCreated {
        token: id(number),
        account: name.clone(),
        name,
        digest: Digest::of(format!("secret {number}").as_bytes()),
        grants: vec![grant(role)],
        expires_at: None,
    }
}

fn after(commands: impl IntoIterator<Item = Command>) -> Given<Access> {
    commands.into_iter().fold(given::<Access>([]), |given, c| {
        given.when(|s| access::decide(s, c)).then_some().1
    })
}

fn revoke(number: usize) -> Command {
    Command::Revoke {
        token: id(number),
        reason: None,
    }
}

#[test]
fn the_first_token_is_made_once() {
    let given = after([Command::Begin(token(1, "admin", Role::Admin))]);
    let again = Command::Begin(token(2, "other", Role::Admin));
    given.when(|s| access::decide(s, again)).then_nothing();
}

#[test]
fn a_name_is_given_once_until_its_token_is_revoked() {
    let given = after([
        Command::Begin(token(1, "admin", Role::Admin)),
        Command::Create(token(2, "ci", Role::Deployer)),
    ]);
    let again = Command::Create(token(3, "ci", Role::Viewer));
    given
        .clone()
        .when(|s| access::decide(s, again.clone()))
        .then_refused("token_exists");
    let (_, given) = given.when(|s| access::decide(s, revoke(2))).then_some();
    given
        .clone()
        .when(|s| access::decide(s, revoke(2)))
        .then_nothing();
    let rotate = Command::Rotate {
        token: id(2),
        digest: Digest::of(b"x"),
        old_until: None,
        expires_at: None,
    };
    given
        .clone()
        .when(|s| access::decide(s, rotate))
        .then_refused("token_revoked");
    given.when(|s| access::decide(s, again)).then_some();
}

#[test]
fn somebody_can_always_administer() {
    let given = after([
        Command::Begin(token(1, "admin", Role::Admin)),
        Command::Create(token(2, "ci", Role::Deployer)),
    ]);
    given
        .clone()
        .when(|s| access::decide(s, revoke(1)))
        .then_refused("last_admin");
    let second = Command::Create(token(3, "second", Role::Admin));
    let (_, given) = given.when(|s| access::decide(s, second)).then_some();
    given.when(|s| access::decide(s, revoke(1))).then_some();
}

#[test]
fn a_token_without_grants_or_with_an_empty_one_is_refused() {
    let mut none = token(1, "ci", Role::Viewer);
    none.grants.clear();
    let mut nowhere = token(1, "ci", Role::Viewer);
    nowhere.grants[0].projects = Projects::Named([].into());
    for bad in [none, nowhere] {
        given::<Access>([])
            .when(|s| access::decide(s, Command::Create(bad)))
            .then_refused("invalid_grants");
    }
}

#[test]
fn revoked_tokens_are_kept_up_to_a_bound_and_taken_ones_always() {
    let mut state = after([Command::Begin(token(0, "admin", Role::Admin))]);
    for number in 1..=REVOKED_MAX + 5 {
        let create = token(number, &format!("t{number}"), Role::Viewer);
        for event in [
            AccessEvent::TokenCreated(create),
            AccessEvent::TokenRevoked(TokenRevoked {
                token: id(number),
                reason: None,
            }),
        ] {
            state.try_apply(event).unwrap();
        }
    }
    let tokens = &state.state.as_ref().unwrap().tokens;
    assert_eq!(tokens.len(), REVOKED_MAX + 1);
    assert!(tokens.contains_key(&id(0)));
    assert!(tokens.contains_key(&id(REVOKED_MAX + 5)));
}

#[test]
fn what_does_not_follow_is_void() {
    let mut given = after([Command::Begin(token(1, "admin", Role::Admin))]);
    let before = given.state.clone();
    for event in [
        AccessEvent::TokenCreated(token(1, "again", Role::Admin)),
        AccessEvent::TokenRevoked(TokenRevoked {
            token: id(7),
            reason: None,
        }),
    ] {
        assert!(given.try_apply(event).is_err());
        assert_eq!(given.state, before);
    }
}

#[test]
fn a_rotation_keeps_the_end_unless_another_is_given() {
    let mut first = token(1, "admin", Role::Admin);
    first.expires_at = Some(daybook_events::testing::time(5_000));
    let given = after([Command::Begin(first.clone())]);
    let rotate = Command::Rotate {
        token: id(1),
        digest: Digest::of(b"x"),
        old_until: None,
        expires_at: None,
    };
    let decided = access::decide(given.state.as_ref(), rotate).unwrap();
    let Decision::Append(AccessEvent::TokenRotated(rotated)) = decided else {
        panic!("{decided:?}")
    };
    assert_eq!(rotated.expires_at, first.expires_at);
}
