//! Signed notes: a text, and Ed25519 signatures under it (C2SP signed-note).

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, Signer, VerifyingKey};
use sha2::{Digest, Sha256};

/// The algorithm byte of Ed25519 in keys and key ids.
const ED25519: u8 = 0x01;
/// A longer note is none of ours.
const MAX_NOTE_BYTES: usize = 1 << 20;
/// More signatures are not looked at: each costs time to check.
const MAX_SIGNATURES: usize = 100;

/// First bytes of a hash over a key and its name, by which a signature says whose it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId(pub [u8; 4]);

impl KeyId {
    fn of(name: &str, key: &VerifyingKey) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(name);
        hasher.update([b'\n', ED25519]);
        hasher.update(key.as_bytes());
        let hash: [u8; 32] = hasher.finalize().into();
        Self([hash[0], hash[1], hash[2], hash[3]])
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Its parts are not those of a key.
    #[error("it does not have the form {0}")]
    Form(&'static str),
    /// The name may not be a key's name.
    #[error("a key's name has no spaces, control characters or plus signs, and is not empty")]
    Name,
    /// The key is for another algorithm than Ed25519.
    #[error("it is not an Ed25519 key")]
    Algorithm,
    /// The name and the key do not belong to the id.
    #[error("its id does not fit its name and key: one of them was changed")]
    Id,
}

fn is_key_name(name: &str) -> bool {
    !name.is_empty()
        && !name
            .chars()
            .any(|c| c.is_whitespace() || c.is_control() || c == '+')
}

fn parse_id(text: &str) -> Option<KeyId> {
    let mut id = [0; 4];
    hex::decode_to_slice(text, &mut id).ok()?;
    // The canonical form is in lower case.
    (hex::encode(id) == text).then_some(KeyId(id))
}

/// Splits off the algorithm, which must be Ed25519.
fn key_bytes(text: &str, form: &'static str) -> Result<[u8; 32], KeyError> {
    let bytes = BASE64.decode(text).map_err(|_| KeyError::Form(form))?;
    match bytes.split_first() {
        Some((&ED25519, key)) => key.try_into().map_err(|_| KeyError::Form(form)),
        Some(_) => Err(KeyError::Algorithm),
        None => Err(KeyError::Form(form)),
    }
}

/// A public key with the name of its owner: `name+id+key`.
#[derive(Clone, PartialEq, Eq)]
pub struct VerifierKey {
    name: String,
    id: KeyId,
    key: VerifyingKey,
}

impl VerifierKey {
    const FORM: &'static str = "<name>+<8 hexadecimal digits>+<base64>";

    /// Whose key it is. For a log, its origin.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its id.
    pub fn id(&self) -> KeyId {
        self.id
    }

    fn verifies(&self, text: &str, signature: &[u8]) -> bool {
        self.verifies_bytes(text.as_bytes(), signature)
    }

    /// Whether it is the key's signature of some bytes.
    pub(super) fn verifies_bytes(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::from_slice(signature)
            .is_ok_and(|signature| self.key.verify_strict(message, &signature).is_ok())
    }
}

impl FromStr for VerifierKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(KeyError::Form(Self::FORM));
        };
        if !is_key_name(name) {
            return Err(KeyError::Name);
        }
        let id = parse_id(id).ok_or(KeyError::Form(Self::FORM))?;
        let key = key_bytes(key, Self::FORM)?;
        let key = VerifyingKey::from_bytes(&key).map_err(|_| KeyError::Form(Self::FORM))?;
        if KeyId::of(name, &key) != id {
            return Err(KeyError::Id);
        }
        let name = name.to_owned();
        Ok(Self { name, id, key })
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut key = vec![ED25519];
        key.extend_from_slice(self.key.as_bytes());
        write!(f, "{}+{}+{}", self.name, self.id, BASE64.encode(key))
    }
}

impl fmt::Debug for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A private key with the name of its owner: `PRIVATE+KEY+name+id+key`. Never printed.
#[derive(Clone)]
pub struct SignerKey {
    verifier: VerifierKey,
    key: ed25519_dalek::SigningKey,
}

impl SignerKey {
    const FORM: &'static str = "PRIVATE+KEY+<name>+<8 hexadecimal digits>+<base64>";

    /// A new key from the system's random numbers.
    pub fn generate(name: &str) -> Result<Self, GenerateError> {
        if !is_key_name(name) {
            return Err(GenerateError::Name(KeyError::Name));
        }
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|e| GenerateError::NoRandomness(e.to_string()))?;
        Ok(Self::from_seed(name, &seed))
    }

    fn from_seed(name: &str, seed: &[u8; 32]) -> Self {
        let key = ed25519_dalek::SigningKey::from_bytes(seed);
        let public = key.verifying_key();
        let verifier = VerifierKey {
            id: KeyId::of(name, &public),
            name: name.to_owned(),
            key: public,
        };
        Self { verifier, key }
    }

    /// What others check its signatures with.
    pub fn verifier(&self) -> &VerifierKey {
        &self.verifier
    }

    /// The private form. Handle with care: whoever has it can sign in this name.
    pub fn expose(&self) -> String {
        let mut key = vec![ED25519];
        key.extend_from_slice(self.key.as_bytes());
        let VerifierKey { name, id, .. } = &self.verifier;
        format!("PRIVATE+KEY+{name}+{id}+{}", BASE64.encode(key))
    }

    /// Signs bytes that can be no note.
    pub(super) fn sign_bytes(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }

    fn sign(&self, text: &str) -> NoteSignature {
        NoteSignature {
            name: self.verifier.name.clone(),
            id: self.verifier.id,
            signature: self.key.sign(text.as_bytes()).to_vec(),
        }
    }
}

/// Why no key could be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GenerateError {
    /// The name may not be a key's name.
    #[error(transparent)]
    Name(KeyError),
    /// The system gave no random numbers.
    #[error("the system gives no random numbers: {0}")]
    NoRandomness(String),
}

impl FromStr for SignerKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let form = KeyError::Form(Self::FORM);
        let mut parts = text
            .strip_prefix("PRIVATE+KEY+")
            .ok_or(form)?
            .splitn(3, '+');
        let (Some(name), Some(id), Some(seed)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(form);
        };
        if !is_key_name(name) {
            return Err(KeyError::Name);
        }
        let id = parse_id(id).ok_or(form)?;
        let key = Self::from_seed(name, &key_bytes(seed, Self::FORM)?);
        if key.verifier.id != id {
            return Err(KeyError::Id);
        }
        Ok(key)
    }
}

impl fmt::Debug for SignerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SignerKey").field(&self.verifier).finish()
    }
}

/// One signature under a note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoteSignature {
    /// Who claims to have signed.
    pub name: String,
    /// With which key.
    pub id: KeyId,
    /// What stands after the key id.
    pub signature: Vec<u8>,
}

/// A note with its signatures, of which none has been checked yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedNote {
    /// What was signed. Ends with a newline.
    pub text: String,
    /// All signatures, in their order, whoever made them.
    pub signatures: Vec<NoteSignature>,
}

/// Why bytes are no signed note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// It is too long, not UTF-8, or has control characters.
    #[error("it is not a text without control characters of at most 1 MiB")]
    Text,
    /// No blank line divides a text from signatures.
    #[error("no blank line divides the text from signatures")]
    NoSignatures,
    /// A signature line does not have the form `— name base64`.
    #[error("its signature line {0} does not have the form `— <name> <base64>`")]
    SignatureLine(usize),
    /// It has more signatures than are looked at.
    #[error("it has more than {MAX_SIGNATURES} signatures")]
    TooMany,
}

/// Why a note is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// A signature claims to be of a known key and is not.
    #[error(
        "the signature of {name} with key {id} is wrong: the text was changed, or the signature"
    )]
    Invalid {
        /// Whose it claims to be.
        name: String,
        /// The key.
        id: KeyId,
    },
    /// None of the known keys signed it.
    #[error(
        "none of the given keys signed it; signatures are by {}",
        signers(found)
    )]
    Unknown {
        /// Who did, by name and key id.
        found: Vec<(String, KeyId)>,
    },
}

fn signers(found: &[(String, KeyId)]) -> String {
    let names: Vec<_> = found.iter().map(|(n, id)| format!("{n}+{id}")).collect();
    names.join(", ")
}

impl SignedNote {
    /// Signs a text with all of these keys. The text must end with a newline.
    pub fn sign(text: String, keys: &[SignerKey]) -> Self {
        let signatures = keys.iter().map(|key| key.sign(&text)).collect();
        Self { text, signatures }
    }

    /// Reads a note. Nothing is verified by that.
    pub fn parse(bytes: &[u8]) -> Result<Self, NoteError> {
        if bytes.len() > MAX_NOTE_BYTES {
            return Err(NoteError::Text);
        }
        let all = std::str::from_utf8(bytes).map_err(|_| NoteError::Text)?;
        if all.bytes().any(|b| b < 0x20 && b != b'\n') {
            return Err(NoteError::Text);
        }
        let split = all.rfind("\n\n").ok_or(NoteError::NoSignatures)?;
        let (text, lines) = (&all[..=split], &all[split + 2..]);
        let lines = lines.strip_suffix('\n').ok_or(NoteError::NoSignatures)?;
        let mut signatures = Vec::new();
        for (number, line) in lines.split('\n').enumerate() {
            if number == MAX_SIGNATURES {
                return Err(NoteError::TooMany);
            }
            signatures.push(parse_signature(line).ok_or(NoteError::SignatureLine(number + 1))?);
        }
        Ok(Self {
            text: text.to_owned(),
            signatures,
        })
    }

    /// Checks the signatures of those who are known; there must be one, and none may be wrong.
    /// Signatures of others are left alone. Returns whose signatures hold.
    pub fn verify<'k>(
        &self,
        known: &'k [VerifierKey],
    ) -> Result<Vec<&'k VerifierKey>, SignatureError> {
        let mut good: Vec<&VerifierKey> = Vec::new();
        for signature in &self.signatures {
            let NoteSignature { name, id, .. } = signature;
            let Some(key) = known.iter().find(|k| k.id == *id && k.name == *name) else {
                continue;
            };
            if !key.verifies(&self.text, &signature.signature) {
                let name = name.clone();
                return Err(SignatureError::Invalid { name, id: *id });
            }
            if !good.contains(&key) {
                good.push(key);
            }
        }
        if good.is_empty() {
            let found = self.signatures.iter().map(|s| (s.name.clone(), s.id));
            return Err(SignatureError::Unknown {
                found: found.collect(),
            });
        }
        Ok(good)
    }
}

impl fmt::Display for SignedNote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.text)?;
        for NoteSignature {
            name,
            id,
            signature,
        } in &self.signatures
        {
            let mut bytes = id.0.to_vec();
            bytes.extend_from_slice(signature);
            writeln!(f, "— {name} {}", BASE64.encode(bytes))?;
        }
        Ok(())
    }
}

fn parse_signature(line: &str) -> Option<NoteSignature> {
    let (name, signature) = line.strip_prefix("— ")?.split_once(' ')?;
    let bytes = BASE64.decode(signature).ok()?;
    let (id, signature) = bytes.split_first_chunk()?;
    (is_key_name(name) && !signature.is_empty()).then(|| NoteSignature {
        name: name.to_owned(),
        id: KeyId(*id),
        signature: signature.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(name: &str, seed: u8) -> SignerKey {
        SignerKey::from_seed(name, &[seed; 32])
    }

    #[test]
    fn keys_read_as_they_are_written() {
        let signer = SignerKey::generate("log.example.com/daybook").unwrap();
        let again: SignerKey = signer.expose().parse().unwrap();
        assert_eq!(again.expose(), signer.expose());
        let verifier: VerifierKey = signer.verifier().to_string().parse().unwrap();
        assert_eq!(&verifier, signer.verifier());
        // PRIVATE+KEY+<name>+<id>+<the key in Base64, which may have a + itself>
        let secret = signer.expose();
        let secret = secret.splitn(5, '+').nth(4).unwrap();
        assert!(secret.len() > 40, "it is the key");
        assert!(!format!("{signer:?}").contains(secret));
    }

    /// The key, the note and the signature are those of the documentation of Go's
    /// `golang.org/x/mod/sumdb/note`.
    #[test]
    fn a_note_that_others_signed_is_understood() {
        let key = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
        let text = "If you think cryptography is the answer to your problem,\n\
                    then you don't know what your problem is.\n";
        let note = format!(
            "{text}\n— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
        );
        let parsed = SignedNote::parse(note.as_bytes()).unwrap();
        assert_eq!(parsed.text, text);
        let known: [VerifierKey; 1] = [key.parse().unwrap()];
        assert_eq!(parsed.verify(&known).unwrap(), [&known[0]]);
        assert_eq!(parsed.to_string(), note);
    }

    #[test]
    fn any_changed_byte_of_a_note_is_noticed() {
        let signer = key("log", 1);
        let known = [signer.verifier().clone()];
        let note = SignedNote::sign("log\n5\nroot\n".into(), &[signer]).to_string();
        for at in 0..note.len() {
            for bit in 0..8 {
                let mut bytes = note.clone().into_bytes();
                bytes[at] ^= 1 << bit;
                let believed = SignedNote::parse(&bytes)
                    .ok()
                    .filter(|n| n.verify(&known).is_ok());
                assert_eq!(believed, None, "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn unknown_signatures_are_left_alone_but_one_must_be_known() {
        let (ours, theirs) = (key("log", 1), key("witness", 2));
        let note = SignedNote::sign("text\n".into(), &[ours.clone(), theirs.clone()]);
        let known = [ours.verifier().clone()];
        assert_eq!(note.verify(&known).unwrap(), [&known[0]]);
        let stranger = [key("log", 3).verifier().clone()];
        let error = note.verify(&stranger).unwrap_err();
        assert!(error.to_string().contains("witness+"), "{error}");
    }

    #[test]
    fn keys_that_are_none_are_refused() {
        let good = key("log", 1).verifier().to_string();
        let changed = good.replacen("log+", "logs+", 1);
        assert_eq!(changed.parse::<VerifierKey>(), Err(KeyError::Id));
        for text in [
            "",
            "log",
            "log+00000000+",
            "a b+00000000+AAAA",
            "log+0000000g+AQ==",
        ] {
            assert!(text.parse::<VerifierKey>().is_err(), "{text}");
            assert!(format!("PRIVATE+KEY+{text}").parse::<SignerKey>().is_err());
        }
        assert!(SignerKey::generate("with space").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, text in ".*\n\n(— .* .*\n)*") {
            let _ = SignedNote::parse(&bytes);
            if let Ok(note) = SignedNote::parse(text.as_bytes()) {
                let _ = note.verify(&[key("log", 1).verifier().clone()]);
            }
            let _ = text.parse::<VerifierKey>();
        }
    }
}
