//! The catalogue: templates that come with Daybook, and those of a folder of one's own.
//!
//! It is read once, when the server starts. What is deployed from it needs it no more.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use daybook_events::template::Template;
use daybook_events::{Refusal, TemplateName};
use schemars::JsonSchema;
use serde::Serialize;

/// The largest file of a template that is read, in bytes.
const FILE_MAX: u64 = 64 << 10;

/// What comes with Daybook.
const BUILT_IN: [(&str, &str); 3] = [
    ("image.yaml", include_str!("../../../templates/image.yaml")),
    (
        "static-site.yaml",
        include_str!("../../../templates/static-site.yaml"),
    ),
    (
        "web-app.yaml",
        include_str!("../../../templates/web-app.yaml"),
    ),
];

/// Where an entry comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shelf {
    /// It comes with Daybook.
    BuiltIn,
    /// It is in the operator's folder.
    Folder,
}

/// A catalogue that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// A folder or a file of it cannot be read.
    #[error("{} cannot be read", .path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is no template.
    #[error("{} is no template: {problem}", .path.display())]
    Invalid {
        /// Which.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// Two files of a folder have the same template.
    #[error("two files of {} are named {name}", .folder.display())]
    Twice {
        /// The folder.
        folder: PathBuf,
        /// The name of both.
        name: TemplateName,
    },
}

/// The templates that a server knows, by name.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    entries: BTreeMap<TemplateName, (Shelf, Template)>,
}

impl Catalogue {
    /// What comes with Daybook, and the templates of a folder: those take the place of built-in ones
    /// of the same name. Files end in `.yaml`, `.yml` or `.json`; others are left alone.
    pub fn load(folder: Option<&Path>) -> Result<Self, CatalogueError> {
        let mut entries = BTreeMap::new();
        for (file, text) in BUILT_IN {
            let template = parse(Path::new(file), text)?;
            entries.insert(template.name.clone(), (Shelf::BuiltIn, template));
        }
        let Some(folder) = folder else {
            return Ok(Self { entries });
        };
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| CatalogueError::Unreadable { path, source }
        };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable(folder))? {
            let path = entry.map_err(unreadable(folder))?.path();
            let ending = path.extension().and_then(|e| e.to_str());
            if matches!(ending, Some("yaml" | "yml" | "json")) {
                files.push(path);
            }
        }
        files.sort();
        for path in files {
            let length = path.metadata().map_err(unreadable(&path))?.len();
            if length > FILE_MAX {
                let problem = format!("it has {length} bytes, and {FILE_MAX} are the most");
                return Err(CatalogueError::Invalid { path, problem });
            }
            let text = std::fs::read_to_string(&path).map_err(unreadable(&path))?;
            let template = parse(&path, &text)?;
            let name = template.name.clone();
            let before = entries.insert(name.clone(), (Shelf::Folder, template));
            if before.is_some_and(|(shelf, _)| shelf == Shelf::Folder) {
                let folder = folder.to_owned();
                return Err(CatalogueError::Twice { folder, name });
            }
        }
        Ok(Self { entries })
    }

    /// All entries, by name.
    pub fn entries(&self) -> impl Iterator<Item = (Shelf, &Template)> {
        self.entries.values().map(|(shelf, t)| (*shelf, t))
    }

    /// An entry.
    pub fn find(&self, name: &TemplateName) -> Result<(Shelf, &Template), Refusal> {
        let found = self.entries.get(name).map(|(shelf, t)| (*shelf, t));
        found.ok_or_else(|| {
            let names: Vec<_> = self.entries.keys().map(TemplateName::as_str).collect();
            Refusal::new(
                "template_not_found",
                format!("the catalogue has no template {name}"),
                format!("it has: {}", names.join(", ")),
            )
        })
    }
}

fn parse(path: &Path, text: &str) -> Result<Template, CatalogueError> {
    let invalid = |problem: String| CatalogueError::Invalid {
        path: path.to_owned(),
        problem,
    };
    let template: Template = serde_saphyr::from_str(text).map_err(|e| {
        let problem = e.to_string();
        invalid(problem.lines().next().unwrap_or_default().to_owned())
    })?;
    template.check().map_err(|e| invalid(e.message))?;
    Ok(template)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_with_daybook_can_be_used_and_be_replaced() {
        let own = tempfile::tempdir().unwrap();
        let built_in = Catalogue::load(None).unwrap();
        assert_eq!(built_in.entries().count(), BUILT_IN.len());
        let text = "name: image\nversion: '2'\ndescription: Mine.\nservice:\n  image: a/b:c\n";
        std::fs::write(own.path().join("mine.yaml"), text).unwrap();
        std::fs::write(own.path().join("README.md"), "no template").unwrap();
        let with_own = Catalogue::load(Some(own.path())).unwrap();
        let name = "image".parse().unwrap();
        assert_eq!(with_own.find(&name).unwrap().0, Shelf::Folder);
        assert_eq!(with_own.entries().count(), BUILT_IN.len());

        std::fs::write(own.path().join("again.yaml"), text).unwrap();
        let twice = Catalogue::load(Some(own.path())).unwrap_err();
        assert!(matches!(twice, CatalogueError::Twice { .. }), "{twice}");
        for bad in [
            "name: [",
            "name: image",
            "name: x\nversion: '1'\ndescription: d\nservice: {}",
        ] {
            std::fs::write(own.path().join("again.yaml"), bad).unwrap();
            let error = Catalogue::load(Some(own.path())).unwrap_err();
            assert!(matches!(error, CatalogueError::Invalid { .. }), "{error}");
        }
        let gone = Catalogue::load(Some(&own.path().join("gone"))).unwrap_err();
        assert!(matches!(gone, CatalogueError::Unreadable { .. }), "{gone}");
    }
}
