//! Users of an identity provider, which is a real HTTP server here and signs with real keys.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as URL};
use daybook_api::access::AccessMode;
use daybook_api::access::oidc::{Oidc, OidcConfig};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256,
    RsaKeyPair, RsaPublicKeyComponents,
};
use serde_json::{Value, json};

use crate::support::*;

/// A key of this test alone, as ring makes none of this kind.
const RSA: &str = "MIIEpQIBAAKCAQEAwU1Cv1qnxbdpmCEJgldcRiMVYc5bi6320+ffFqWmsAM3F5S/Mqb6TF6DHqrNPpzfqm3WIoE/8N\
    hd+ps5whpfNzCNnqLYE8m89S0tYEYIJuLNnZdRgJMCIdfwO24qzKWimEfgkk67GngNaRsoFumUcMB8Z5ZRqGesBUww\
    9b8gNGQXdM4uO0vE04c94AEMrbtTHvCsDqE0jE1KC+QZqevLVWo6Pk4xiDHfRdgJa6BJPzk655B2cxyx7puRQmjL9M\
    NnsWZmfaDA4hnapPf8LCDRcjuXTkglyhBXCR82RD8vxzFKsnWnTFwOu9BKJTYklLl0LAemUNA9kDyTxAxXsb+WkwID\
    AQABAoIBAE77XJyHVCnrSVAJn7MMMv3Nc/0kri8ig8oN4g+E29jrV2VhN8Zgh8EQlQ7Ax2AgBRvECUzL9u5X2f590l\
    nHIMSSKCt7akKbmYOsU/AUbVxGK7GKlJiueJ6Pdu8xkndP7mG+bLobRUQJbaFWoUjLZAW2AJ7qwq7GvXjkqtSepXAC\
    B9ooBSgGrZUH3KlSDX46KjhQMteVziuUqvK/B/aSP+ZSsKhREK79BLOMgK5Z5EkU+aum8JqTorU/tNlI2YJvK4iKGb\
    n6ThN3GEc5vBugHWSuNtK/wW6MvBhyhzZk5Tnto+1VBL98kCMwogoox/vKMcHaEcw8aXRhLqSDQm7tawECgYEA5aSe\
    iJAuFQ61/Dkn3krDGVrJF7v8gFM+grS/5g7+w7eR+aZxd+e59Bk+7WO2csRNf7Q7kAneENME8msNgj5dzIjIaPm9f7\
    An4Ba/rtWqptayJnaA46UjaDBB3XlCiXwnklor/GWEv/4Pl+hFeDjyMRTT5DB0S5L80WqZ//Tte1MCgYEA13zck5lz\
    VGCOeP5MFe3hhpYlwH4UBiO7EMR4g8elXOMXpTtwHOrZSBLetGkYhe/KVxm0bAcKiKAgHNpStuomEe+asvcCjcrvBH\
    62nchNDF73yb4TR0jerqskcFv5YjepM+2qJa/IEoi+hh7HnvMmrRLEmNLrouaRApiZ/SndT8ECgYEAoI7JXNfZsFVZ\
    veBEVLJW2BpWcOa5cwtAsGgpp3MigrqNMExEFz6ID/e6vIUz4egH+1qLLnkHryGq2scoacCrGj8kR+kcqfMC3jVpjZ\
    bMOtvvMN833HHwYH8k/fEzKScKD9RF3rEn8Ih0ZJQ8RgMiqlhSkb+i/9fkNZLf20pm5AsCgYEAyJsp8ZKSZkO5fvQm\
    OugI4zVWkdwNoiWTWam+E9hBnrae5aju10ze2JUQlN2eAdpZATsh1su7R7PiEVpCVJyoslvgJamEzCHW39VjBoJZEC\
    I9BagY5Gz3OZ6DvsIw6PmuYHRpyMnbNT3uOIfhCJ2OLONi+G6rBS0mZEdSW/ekW0ECgYEAp42icR0EfELoahNC0YkH\
    SL+gUAQfB7rgJfcLFdFfUo7Se4DNHmEngiULBr/kibSsTDT1+njAMydni4m1NNoWPk6OGfVv+7v1WSgKgs0MWjYwdy\
    pA1HMYi2xxqOdMaM/y3LMykTfb+pjM9XQ5kx5JIvOp7ELfqtgz9RUm66FdMDc=";

enum Key {
    Rsa(Box<RsaKeyPair>),
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

impl Key {
    fn rsa() -> Self {
        let der = STANDARD.decode(RSA).unwrap();
        Self::Rsa(Box::new(RsaKeyPair::from_der(&der).unwrap()))
    }

    fn ec() -> Self {
        let (random, how) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
        let der = EcdsaKeyPair::generate_pkcs8(how, &random).unwrap();
        Self::Ec(EcdsaKeyPair::from_pkcs8(how, der.as_ref(), &random).unwrap())
    }

    fn ed() -> Self {
        let der = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self::Ed(Ed25519KeyPair::from_pkcs8(der.as_ref()).unwrap())
    }

    fn algorithm(&self) -> &'static str {
        match self {
            Self::Rsa(_) => "RS256",
            Self::Ec(_) => "ES256",
            Self::Ed(_) => "EdDSA",
        }
    }

    fn jwk(&self, id: &str) -> Value {
        match self {
            Self::Rsa(key) => {
                let public = RsaPublicKeyComponents::<Vec<u8>>::from(key.public());
                let (n, e) = (URL.encode(public.n), URL.encode(public.e));
                json!({ "kty": "RSA", "kid": id, "use": "sig", "alg": "RS256", "n": n, "e": e })
            }
            Self::Ec(key) => {
                let point = key.public_key().as_ref();
                json!({ "kty": "EC", "kid": id, "crv": "P-256",
                    "x": URL.encode(&point[1..33]), "y": URL.encode(&point[33..]) })
            }
            Self::Ed(key) => {
                let public = key.public_key().as_ref();
                json!({ "kty": "OKP", "kid": id, "crv": "Ed25519", "x": URL.encode(public) })
            }
        }
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Rsa(key) => {
                let mut signed = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signed)
                    .unwrap();
                signed
            }
            Self::Ec(key) => key.sign(&random, message).unwrap().as_ref().to_vec(),
            Self::Ed(key) => key.sign(message).as_ref().to_vec(),
        }
    }
}

/// What is signed.
fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |v: &Value| URL.encode(v.to_string());
    format!("{}.{}", part(header), part(claims))
}

fn token(key: &Key, id: &str, claims: &Value) -> String {
    let header = json!({ "alg": key.algorithm(), "kid": id, "typ": "JWT" });
    let message = unsigned(&header, claims);
    let signed = key.sign(message.as_bytes());
    format!("{message}.{}", URL.encode(signed))
}

/// A provider with keys that can be exchanged.
struct Issuer {
    url: String,
    keys: Arc<Mutex<Vec<Value>>>,
    fetched: Arc<AtomicUsize>,
}

impl Issuer {
    async fn start(keys: Vec<Value>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (keys, fetched) = (Arc::new(Mutex::new(keys)), Arc::new(AtomicUsize::new(0)));
        let discovery = json!({ "issuer": url, "jwks_uri": format!("{url}/keys") });
        let served = (keys.clone(), fetched.clone());
        let router = axum::Router::new()
            .route(
                "/.well-known/openid-configuration",
                get(async move || Json(discovery)),
            )
            .route(
                "/keys",
                get(async move || {
                    served.1.fetch_add(1, Ordering::SeqCst);
                    Json(json!({ "keys": *served.0.lock().unwrap() }))
                }),
            );
        tokio::spawn(async move { axum_serve(listener, router).await });
        Self { url, keys, fetched }
    }

    fn claims(&self) -> Value {
        let now = Timestamp::now().as_second();
        json!({ "iss": self.url, "aud": "daybook", "sub": "u-1234", "exp": now + 600, "iat": now,
            "groups": ["everybody", "shop-team"], "realm": { "roles": ["auditors"] } })
    }
}

/// The smallest of servers, over the client-side library that is there anyway.
async fn axum_serve(listener: tokio::net::TcpListener, router: axum::Router) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let service = hyper_util::service::TowerToHyperService::new(router.clone());
        let io = hyper_util::rt::TokioIo::new(stream);
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(io, service));
    }
}

async fn server_for(issuer: &Issuer) -> Server {
    let config: OidcConfig = serde_json::from_value(json!({
        "issuer": issuer.url,
        "audience": ["daybook"],
        "roles": [
            { "claim": "groups", "value": "shop-team", "role": "deployer",
                "projects": { "named": ["shop"] } },
            { "claim": "/realm/roles", "value": "auditors", "role": "auditor", "projects": "all" },
        ],
    }))
    .unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let oidc = Arc::new(Oidc::new(config).unwrap());
    server_with(|settings, _| {
        settings.access = AccessMode::Required;
        settings.oidc = Some(oidc);
    })
    .await
}

async fn whoami(server: &Server, token: &str) -> Reply {
    let request = server.request(reqwest::Method::GET, "/api/v1/whoami");
    server.send(request.bearer_auth(token)).await
}

#[tokio::test]
async fn whom_the_provider_vouches_for_has_the_roles_of_their_claims() {
    let keys = [("r", Key::rsa()), ("e", Key::ec()), ("d", Key::ed())];
    let issuer = Issuer::start(keys.iter().map(|(id, k)| k.jwk(id)).collect()).await;
    let server = server_for(&issuer).await;
    for (id, key) in &keys {
        let who = whoami(&server, &token(key, id, &issuer.claims()))
            .await
            .ok();
        assert_eq!(
            who["actor"],
            json!({ "kind": "user", "id": "u-1234" }),
            "{id}"
        );
        assert_eq!(
            who["grants"],
            json!([
                { "role": "deployer", "projects": { "named": ["shop"] } },
                { "role": "auditor", "projects": "all" },
            ])
        );
    }
    // What is no account's name is replaced, and always by the same.
    let mut claims = issuer.claims();
    claims["sub"] = json!("Jane Doe <jane@example.com>");
    let one = whoami(&server, &token(&keys[0].1, "r", &claims)).await.ok();
    let again = whoami(&server, &token(&keys[1].1, "e", &claims)).await.ok();
    assert_eq!(one["actor"], again["actor"]);
    assert!(!one.to_string().contains("Jane"), "{one}");
    // Who has no claim that gives a role is known, and may do nothing.
    claims["groups"] = json!([]);
    claims["realm"] = json!({});
    let nothing = whoami(&server, &token(&keys[0].1, "r", &claims)).await;
    nothing.refused(403, "role_missing");
    assert_eq!(issuer.fetched.load(Ordering::SeqCst), 1, "keys are kept");
}

#[tokio::test]
async fn what_the_provider_did_not_sign_for_this_server_is_refused() {
    let (rsa, ec) = (Key::rsa(), Key::ec());
    let issuer = Issuer::start(vec![rsa.jwk("r"), ec.jwk("e")]).await;
    let server = server_for(&issuer).await;
    let good = issuer.claims();
    whoami(&server, &token(&rsa, "r", &good)).await.ok();
    let now = Timestamp::now().as_second();
    for (claim, value, code) in [
        ("iss", json!("https://evil.example"), "unknown_token"),
        ("iss", Value::Null, "unknown_token"),
        ("aud", json!("another-service"), "unknown_token"),
        ("aud", json!(["a", "b"]), "unknown_token"),
        ("aud", Value::Null, "unknown_token"),
        ("exp", json!(now - 120), "token_expired"),
        ("exp", json!("soon"), "unknown_token"),
        ("exp", Value::Null, "unknown_token"),
        ("nbf", json!(now + 600), "unknown_token"),
        ("sub", Value::Null, "unknown_token"),
    ] {
        let mut claims = good.clone();
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(claim)),
            ref value => claims[claim] = value.clone(),
        }
        let reply = whoami(&server, &token(&rsa, "r", &claims)).await;
        assert_eq!(reply.status.as_u16(), 401, "{claim} {value}: {reply:?}");
        reply.refused(401, code);
    }
    // No signature at all.
    for alg in ["none", "None", "NONE"] {
        let message = unsigned(&json!({ "alg": alg, "kid": "r" }), &good);
        let reply = whoami(&server, &format!("{message}.")).await;
        assert_eq!(reply.status.as_u16(), 401, "{alg}: {reply:?}");
    }
    // The public key, which everybody has, as the secret of an HMAC.
    let jwk = rsa.jwk("r");
    let modulus = URL.decode(jwk["n"].as_str().unwrap()).unwrap();
    for secret in [modulus.as_slice(), jwk.to_string().as_bytes()] {
        let message = unsigned(&json!({ "alg": "HS256", "kid": "r" }), &good);
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
        let signed = URL.encode(ring::hmac::sign(&key, message.as_bytes()));
        let reply = whoami(&server, &format!("{message}.{signed}")).await;
        reply.refused(401, "unknown_token");
    }
    // A key of one kind under the name of another, and another's signature.
    whoami(&server, &token(&rsa, "e", &good))
        .await
        .refused(401, "unknown_token");
    whoami(&server, &token(&Key::ec(), "e", &good))
        .await
        .refused(401, "unknown_token");
    // Claims that were changed after they were signed.
    let signed = token(&rsa, "r", &good);
    let (header, signature) = (
        signed.split('.').next().unwrap(),
        signed.rsplit('.').next().unwrap(),
    );
    let mut claims = good.clone();
    claims["sub"] = json!("root");
    let forged = format!("{header}.{}.{signature}", URL.encode(claims.to_string()));
    whoami(&server, &forged).await.refused(401, "unknown_token");
}

#[tokio::test]
async fn keys_that_are_new_are_fetched_and_not_for_every_token() {
    let (old, new) = (Key::ec(), Key::ed());
    let issuer = Issuer::start(vec![old.jwk("old")]).await;
    let server = server_for(&issuer).await;
    whoami(&server, &token(&old, "old", &issuer.claims()))
        .await
        .ok();
    *issuer.keys.lock().unwrap() = vec![new.jwk("new")];
    // However many come with names that nobody knows, the provider is asked now and then.
    let before = issuer.fetched.load(Ordering::SeqCst);
    let begun = std::time::Instant::now();
    for number in 0..50 {
        let unknown = token(&new, &format!("unknown-{number}"), &issuer.claims());
        whoami(&server, &unknown)
            .await
            .refused(401, "unknown_token");
    }
    // It pauses for three seconds.
    let pauses = usize::try_from(begun.elapsed().as_secs() / 3).unwrap();
    assert!(issuer.fetched.load(Ordering::SeqCst) <= before + 1 + pauses);
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        let reply = whoami(&server, &token(&new, "new", &issuer.claims())).await;
        if reply.status.is_success() {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "{reply:?}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    // The one that was withdrawn is gone with it.
    let gone = whoami(&server, &token(&old, "old", &issuer.claims())).await;
    gone.refused(401, "unknown_token");
}

#[tokio::test]
async fn a_provider_that_does_not_answer_keeps_nobody_out_but_its_own() {
    let key = Key::ed();
    let mut issuer = Issuer::start(vec![key.jwk("d")]).await;
    // Nobody listens there.
    issuer.url = format!("http://127.0.0.1:{}", 9);
    let server = server_for(&issuer).await;
    let reply = whoami(&server, &token(&key, "d", &issuer.claims())).await;
    let problem = reply.refused(503, "identity_provider_unavailable");
    assert_eq!(problem["retryable"], true);
    whoami(&server, "daybook_1")
        .await
        .refused(401, "invalid_credential");
    server.get("/healthz").await.ok();
}

#[tokio::test]
async fn streams_end_with_the_token_of_the_provider() {
    let key = Key::ed();
    let issuer = Issuer::start(vec![key.jwk("d")]).await;
    let server = server_for(&issuer).await;
    let mut claims = issuer.claims();
    // The clocks may differ by 30 s: it is taken for eight seconds more.
    claims["exp"] = json!(Timestamp::now().as_second() - 22);
    let request = server.request(reqwest::Method::GET, "/api/v1/events?follow=true");
    let response = request.bearer_auth(token(&key, "d", &claims)).send();
    let response = response.await.unwrap();
    assert_eq!(response.status(), 200);
    let mut stream = response.bytes_stream();
    let ended = async { while let Some(Ok(_)) = stream.next().await {} };
    let ended = tokio::time::timeout(PATIENCE, ended).await;
    ended.expect("the stream ends");
}
