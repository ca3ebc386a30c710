//! Ejecting a project: its GitOps repository with its history and all that is needed to go on
//! without Daybook, in one archive.
//!
//! The same state of the repository gives the same bytes, so that two people can compare what they
//! have. An archive is made in a temporary file and sent when it is whole: what cannot be ejected
//! is an answer, and not the end of a download.

mod repository;
mod texts;
mod zip;

use std::fs::File;
use std::io::{self, BufWriter, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use daybook_events::{ProjectName, RepositoryUrl};
use daybook_secrets::Masker;
use repository::AtHead;
pub(crate) use texts::Place;

use zip::Zip;

/// The form of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// For people.
    Zip,
    /// For unpacking.
    Tar,
}

/// What is ejected.
pub(crate) struct Wish {
    pub(crate) project: ProjectName,
    /// The repository.
    pub(crate) repository: PathBuf,
    pub(crate) places: Vec<Place>,
    pub(crate) remote: Option<RepositoryUrl>,
    pub(crate) form: Form,
    /// Finds values of secrets.
    pub(crate) masker: Option<std::sync::Arc<Masker>>,
}

/// Why nothing was ejected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EjectError {
    /// Somebody committed the value of a secret.
    #[error("object {object} of the repository contains the value of a secret")]
    Secret {
        /// The git object.
        object: String,
    },
    /// It could not be read or written.
    #[error("the repository could not be ejected")]
    Io(#[from] io::Error),
}

/// Makes the archive of a project. This takes as long as reading the whole history does.
pub(crate) fn archive(wish: &Wish) -> Result<File, EjectError> {
    let at_head = AtHead::open(&wish.repository)?;
    let mut objects = at_head.objects()?;
    if let Some(masker) = &wish.masker {
        for object in at_head.reachable()? {
            let content = objects.object(&object)?;
            // Where the values cannot be read, nobody can say that none is in it.
            if masker.find(&content).is_none_or(|found| !found.is_empty()) {
                return Err(EjectError::Secret { object });
            }
        }
    }
    let mut out = Archive::new(wish.form, tempfile::tempfile()?);
    out.add(
        "EJECTED.md",
        false,
        texts::readme(
            &wish.project,
            &at_head.head,
            &wish.places,
            wish.remote.as_ref(),
        )
        .as_bytes(),
    )?;
    for place in &wish.places {
        let text = texts::application(&wish.project, place, wish.remote.as_ref());
        let name = format!("argocd/{}-{}.yaml", wish.project, place.name);
        out.add(&name, false, text.as_bytes())?;
    }
    for file in at_head.files()? {
        // Somebody may have committed an earlier one.
        if file.path != "EJECTED.md" && !out.has(&file.path) {
            out.add(&file.path, file.executable, &objects.file(&file)?)?;
        }
    }
    add_history(&at_head, &mut out)?;
    Ok(out.finish()?)
}

/// The folder `.git`.
fn add_history(at_head: &AtHead, out: &mut Archive) -> io::Result<()> {
    let folder = tempfile::tempdir()?;
    let pack = at_head.pack_into(folder.path())?;
    out.add(".git/HEAD", false, b"ref: refs/heads/main\n")?;
    out.add(
        ".git/config",
        false,
        b"[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n",
    )?;
    for ending in ["idx", "pack"] {
        let name = format!("{pack}.{ending}");
        let content = std::fs::read(folder.path().join(&name))?;
        out.add(&format!(".git/objects/pack/{name}"), false, &content)?;
    }
    let head = format!("{}\n", at_head.head);
    out.add(".git/refs/heads/main", false, head.as_bytes())
}

/// An archive that is being written.
struct Archive {
    names: std::collections::BTreeSet<String>,
    kind: Kind,
}

enum Kind {
    Zip(Zip<BufWriter<File>>),
    Tar(Box<tar::Builder<BufWriter<File>>>),
}

impl Archive {
    fn new(form: Form, out: File) -> Self {
        let out = BufWriter::new(out);
        let kind = match form {
            Form::Zip => Kind::Zip(Zip::new(out)),
            Form::Tar => Kind::Tar(Box::new(tar::Builder::new(out))),
        };
        Self {
            names: Default::default(),
            kind,
        }
    }

    fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    fn add(&mut self, name: &str, executable: bool, content: &[u8]) -> io::Result<()> {
        self.names.insert(name.to_owned());
        match &mut self.kind {
            Kind::Zip(zip) => zip.add(name, executable, content),
            Kind::Tar(tar) => {
                let mut header = tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                header.set_mode(if executable { 0o755 } else { 0o644 });
                header.set_mtime(0);
                tar.append_data(&mut header, Path::new(name), content)
            }
        }
    }

    fn finish(self) -> io::Result<File> {
        let mut out = match self.kind {
            Kind::Zip(zip) => zip.finish()?,
            Kind::Tar(tar) => tar.into_inner()?,
        };
        out.flush()?;
        let mut file = out.into_inner().map_err(|e| e.into_error())?;
        file.rewind()?;
        Ok(file)
    }
}
