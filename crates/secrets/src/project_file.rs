//! What is kept for one project: the key of its commitments, and its values.

use std::fmt;
use std::path::Path;

use daybook_events::ProjectName;
use daybook_events::secret::{Commitment, SecretId};
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::cipher::{Cipher, random};
use crate::store::{Committed, SecretError};
use crate::value::SecretValue;

/// What a file begins with; a later format begins differently.
const MAGIC: &[u8] = b"daybook-secrets 1\n";

/// The key of a project's commitments, and its values, decrypted.
#[derive(Serialize, Deserialize)]
pub(crate) struct ProjectSecrets {
    key_id: Uuid,
    key: Zeroizing<[u8; 32]>,
    values: Vec<Kept>,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    id: SecretId,
    commitment: Commitment,
    value: Zeroizing<String>,
}

impl fmt::Debug for ProjectSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProjectSecrets")
            .field("key_id", &self.key_id)
            .field("values", &self.values.len())
            .finish_non_exhaustive()
    }
}

impl ProjectSecrets {
    /// A new key and no values.
    pub(crate) fn generate() -> std::io::Result<Self> {
        Ok(Self {
            key_id: Uuid::new_v4(),
            key: random()?,
            values: Vec::new(),
        })
    }

    /// Reads the bytes of a project's file.
    pub(crate) fn open(
        bytes: &[u8],
        cipher: &Cipher,
        project: &ProjectName,
        path: &Path,
    ) -> Result<Self, SecretError> {
        let damaged = || SecretError::Damaged(path.to_owned());
        let sealed = bytes.strip_prefix(MAGIC).ok_or_else(damaged)?;
        let text = cipher.open(sealed, &about(project)).ok_or_else(damaged)?;
        // The error would quote the text.
        serde_json::from_slice(&text).map_err(|_| damaged())
    }

    /// The bytes of the project's file.
    pub(crate) fn seal(&self, cipher: &Cipher, project: &ProjectName) -> std::io::Result<Vec<u8>> {
        // Room for all of it, so that growing leaves no copies behind.
        let room: usize = self.values.iter().map(|v| 6 * v.value.len() + 512).sum();
        let mut text = Zeroizing::new(Vec::with_capacity(room + 1024));
        serde_json::to_writer(&mut *text, self)?;
        let sealed = cipher.seal(&text, &about(project))?;
        Ok([MAGIC, &sealed].concat())
    }

    pub(crate) fn commit(
        &self,
        project: &ProjectName,
        id: &SecretId,
        value: &SecretValue,
    ) -> Committed {
        let scope = &id.scope;
        // No part but the last can contain a NUL character.
        let parts = [
            "daybook secret commitment 1",
            project.as_str(),
            id.name.as_str(),
            scope.environment.as_ref().map_or("", |e| e.as_str()),
            scope.service.as_ref().map_or("", |s| s.as_str()),
            value.expose(),
        ];
        Committed {
            commitment: Commitment::from_hmac(&self.mac(&parts.map(str::as_bytes))),
            key: self.key_id,
        }
    }

    pub(crate) fn request_digest(&self, project: &ProjectName, request: &[u8]) -> String {
        let parts = [
            b"daybook secret request 1",
            project.as_str().as_bytes(),
            request,
        ];
        Commitment::from_hmac(&self.mac(&parts)).to_string()
    }

    fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        // A key that is shorter than a block is one with zeros behind it (RFC 2104).
        let mut block = Zeroizing::new([0; 64]);
        block[..32].copy_from_slice(&*self.key);
        let mut mac = <Hmac<Sha256> as Mac>::new((&*block).into());
        for (i, part) in parts.iter().enumerate() {
            if i > 0 {
                mac.update(b"\0");
            }
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    }

    /// Keeps a value; false if it was kept already.
    pub(crate) fn keep(
        &mut self,
        id: &SecretId,
        commitment: &Commitment,
        value: &SecretValue,
    ) -> bool {
        if self.find(id, commitment).is_some() {
            return false;
        }
        self.values.push(Kept {
            id: id.clone(),
            commitment: commitment.clone(),
            value: Zeroizing::new(value.expose().to_owned()),
        });
        true
    }

    /// Erases the values of a secret; false if there were none.
    pub(crate) fn erase(&mut self, id: &SecretId) -> bool {
        let before = self.values.len();
        self.values.retain(|v| v.id != *id);
        self.values.len() < before
    }

    pub(crate) fn find(&self, id: &SecretId, commitment: &Commitment) -> Option<SecretValue> {
        let kept = self
            .values
            .iter()
            .find(|v| v.id == *id && v.commitment == *commitment)?;
        SecretValue::new(kept.value.clone()).ok()
    }

    pub(crate) fn values(&self) -> Vec<SecretValue> {
        let values = self.values.iter();
        values
            .filter_map(|v| SecretValue::new(v.value.clone()).ok())
            .collect()
    }
}

/// What the encryption is bound to, so that a project's file is none for another one.
fn about(project: &ProjectName) -> Vec<u8> {
    [MAGIC, project.as_str().as_bytes()].concat()
}
