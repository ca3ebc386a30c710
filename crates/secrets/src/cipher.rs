//! Encryption of the files that hold values, and the key file.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use zeroize::Zeroizing;

use crate::folder::write_private;
use crate::store::SecretError;

const NONCE: usize = 24;

/// The key of a secret store: 32 random bytes in a file of their own.
#[derive(Clone)]
pub(crate) struct Cipher(Zeroizing<[u8; 32]>);

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(…)")
    }
}

/// Random bytes from the operating system.
pub(crate) fn random<const N: usize>() -> io::Result<Zeroizing<[u8; N]>> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(&mut *bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(bytes)
}

impl Cipher {
    /// Reads a key file.
    pub(crate) fn read(path: &Path) -> Result<Self, SecretError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => Zeroizing::new(bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(SecretError::NoKey(path.to_owned()));
            }
            Err(source) => {
                return Err(SecretError::Unusable {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let key = <[u8; 32]>::try_from(bytes.as_slice())
            .map_err(|_| SecretError::Damaged(path.to_owned()))?;
        Ok(Self(Zeroizing::new(key)))
    }

    /// Makes a key file. Nobody else may do so at the same time.
    pub(crate) fn create(path: &Path) -> Result<Self, SecretError> {
        let unusable = |source| SecretError::Unusable {
            path: path.to_owned(),
            source,
        };
        let key = random::<32>().map_err(unusable)?;
        write_private(path, &*key).map_err(unusable)?;
        Ok(Self(key))
    }

    /// Encrypts. `about` is not encrypted, but the text can only be read again with the same.
    pub(crate) fn seal(&self, text: &[u8], about: &[u8]) -> io::Result<Vec<u8>> {
        let nonce = random::<NONCE>()?;
        let payload = Payload {
            msg: text,
            aad: about,
        };
        let sealed = self
            .algorithm()
            .encrypt(XNonce::from_slice(&*nonce), payload)
            .map_err(|_| io::Error::other("the values cannot be encrypted"))?;
        Ok([&nonce[..], &sealed].concat())
    }

    /// Decrypts what [`Self::seal`] made; none if it is anything else.
    pub(crate) fn open(&self, sealed: &[u8], about: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE)?;
        let payload = Payload {
            msg: sealed,
            aad: about,
        };
        let text = self
            .algorithm()
            .decrypt(XNonce::from_slice(nonce), payload)
            .ok()?;
        Some(Zeroizing::new(text))
    }

    fn algorithm(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new((&*self.0).into())
    }
}
