//! Who may send an upload now.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use daybook_events::ProjectName;

/// Places for so many uploads at once, of which one project takes some at most.
#[derive(Debug)]
pub(super) struct Places {
    all: usize,
    of_project: usize,
    taken: Mutex<HashMap<ProjectName, usize>>,
}

/// A place that is taken, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    project: ProjectName,
}

impl Places {
    pub(super) fn new(all: usize, of_project: usize) -> Arc<Self> {
        Arc::new(Self {
            all,
            of_project,
            taken: Mutex::default(),
        })
    }

    /// A place for this project; none while all, or all that one project may have, are taken.
    pub(super) fn take(self: &Arc<Self>, project: &ProjectName) -> Option<Place> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = taken.values().sum();
        let own = taken.get(project).copied().unwrap_or_default();
        if all >= self.all || own >= self.of_project {
            return None;
        }
        taken.insert(project.clone(), own + 1);
        Some(Place {
            places: self.clone(),
            project: project.clone(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let taken = self.places.taken.lock();
        let mut taken = taken.unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.project) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.project);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_leaves_places_to_others() {
        let project = |name: &str| ProjectName::parse(name).unwrap();
        let (shop, bank, park) = (project("shop"), project("bank"), project("park"));
        let places = Places::new(3, 2);
        let one = places.take(&shop);
        let two = places.take(&shop);
        assert!(one.is_some() && two.is_some());
        assert!(places.take(&shop).is_none());
        let other = places.take(&bank);
        assert!(other.is_some());
        assert!(places.take(&park).is_none());
        drop(one);
        assert!(places.take(&park).is_some());
        drop((two, other));
        assert!(places.taken.lock().unwrap().is_empty());
    }
}
