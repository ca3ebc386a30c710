//! Who may use Daybook: given, when, then.
#![allow(clippy::unwrap_used)]

use daybook_events::access::{
    self, Access, AccessEvent, AccountName, Command, Grant, NewEnd, Projects, REVOKED_MAX, Role,
    TokenCreated, TokenId, TokenRevoked, TokenRotated,
};
use daybook_events::testing::{Given, given, time};
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

/// Another secret, at 1000 seconds.
fn rotate(number: usize, end: NewEnd) -> Command {
    Command::Rotate {
        token: id(number),
        digest: Digest::of(b"x"),
        old_until: None,
        end,
        now: time(1_000),
    }
}

fn rotated(given: &Given<Access>, number: usize, end: NewEnd) -> TokenRotated {
    let decided = access::decide(given.state.as_ref(), rotate(number, end)).unwrap();
    let Decision::Append(AccessEvent::TokenRotated(rotated)) = decided else {
        panic!("{decided:?}")
    };
    rotated
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
    given
        .clone()
        .when(|s| access::decide(s, rotate(2, NewEnd::AsBefore)))
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
    // One that ends by itself does not do, whether it has ended yet or not.
    let ends = |number, end| {
        let mut ends = token(number, &format!("ends-{number}"), Role::Admin);
        ends.expires_at = Some(time(end));
        Command::Create(ends)
    };
    let (_, given) = given.when(|s| access::decide(s, ends(3, 10))).then_some();
    let (_, given) = given
        .when(|s| access::decide(s, ends(4, 1_000_000)))
        .then_some();
    for command in [revoke(1), rotate(1, NewEnd::At(time(2_000_000)))] {
        given
            .clone()
            .when(|s| access::decide(s, command))
            .then_refused("last_admin");
    }
    // Its secret can be exchanged all the same, and those that end can be revoked.
    for command in [
        rotate(1, NewEnd::AsBefore),
        rotate(1, NewEnd::Never),
        revoke(3),
        revoke(4),
    ] {
        given
            .clone()
            .when(|s| access::decide(s, command))
            .then_some();
    }
    let second = Command::Create(token(5, "second", Role::Admin));
    let (_, given) = given.when(|s| access::decide(s, second)).then_some();
    for command in [revoke(1), rotate(1, NewEnd::At(time(2_000_000)))] {
        given
            .clone()
            .when(|s| access::decide(s, command))
            .then_some();
    }
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
    let mut ends = token(1, "ci", Role::Deployer);
    ends.expires_at = Some(time(5_000));
    let given = after([Command::Create(ends)]);
    for (end, expected) in [
        (NewEnd::AsBefore, Some(time(5_000))),
        (NewEnd::At(time(7_000)), Some(time(7_000))),
        (NewEnd::Never, None),
    ] {
        assert_eq!(rotated(&given, 1, end).expires_at, expected, "{end:?}");
    }
}

#[test]
fn a_token_that_has_ended_gets_no_secret_that_ends_with_it() {
    let mut ended = token(1, "ci", Role::Deployer);
    ended.expires_at = Some(time(500));
    let given = after([Command::Create(ended)]);
    for end in [NewEnd::AsBefore, NewEnd::At(time(999))] {
        given
            .clone()
            .when(|s| access::decide(s, rotate(1, end)))
            .then_refused("expiry_in_past");
    }
    let again = rotated(&given, 1, NewEnd::At(time(5_000)));
    assert_eq!(again.expires_at, Some(time(5_000)));
}
