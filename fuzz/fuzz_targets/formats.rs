//! The formats of the transparency log: whatever the bytes are, an answer and no panic. What is
//! read and has one form is written as it was read.
#![no_main]

use bytes::Bytes;
use daybook_store::tlog::{
    Checkpoint, ProofFile, SignedNote, TilePath, decode_bundle, encode_bundle, parse_verifiers,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((form, rest)) = data.split_first() else {
        return;
    };
    let text = std::str::from_utf8(rest);
    match form % 6 {
        0 => drop(SignedNote::parse(rest)),
        1 => drop(Checkpoint::parse_unverified(rest)),
        2 => drop(ProofFile::parse(rest)),
        3 => {
            if let Some(path) = text.ok().and_then(|t| t.parse::<TilePath>().ok()) {
                assert_eq!(Ok(path.to_string().as_str()), text);
            }
        }
        4 => {
            let Some((width, bundle)) = rest.split_first() else {
                return;
            };
            let bundle = Bytes::copy_from_slice(bundle);
            if let Ok(entries) = decode_bundle(&bundle, usize::from(*width)) {
                assert_eq!(encode_bundle(&entries).ok(), Some(bundle));
            }
        }
        _ => drop(text.map(parse_verifiers)),
    }
});
