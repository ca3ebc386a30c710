//! What a service instance runs differently from its service's definition, because somebody said so.
//!
//! It is part of the snapshot of each deployment: a later deployment of the instance takes it over
//! from the main one, and whoever goes back to an older deployment goes back to its configuration,
//! too.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names::EnvKey;
use crate::spec::RunSpec;

/// What was changed for one service instance.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct InstanceConfig {
    /// Variables with their values; null for one that is taken away.
    #[serde(default)]
    pub env: BTreeMap<EnvKey, Option<String>>,
    /// Instances in each cluster.
    #[serde(default)]
    pub replicas: Option<u32>,
}

impl InstanceConfig {
    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.env.is_empty() && self.replicas.is_none()
    }

    /// Changes what a definition says.
    pub fn apply(&self, run: &mut RunSpec) {
        for (key, value) in &self.env {
            match value {
                Some(value) => drop(run.env.insert(key.clone(), value.clone())),
                None => drop(run.env.remove(key)),
            }
        }
        run.replicas = self.replicas.unwrap_or(run.replicas);
    }
}
