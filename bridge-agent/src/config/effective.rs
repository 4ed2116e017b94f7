//! The configuration as it takes effect, with every default spelled out.

use super::{Config, Network, Role};

impl Config {
    /// The same configuration with every default filled in: each rule has its networks, the pool its
    /// destinations. Reading its output as YAML gives the same policy.
    #[must_use]
    pub fn effective(&self) -> Self {
        let mut config = self.clone();
        let fill = |list: &mut Option<Vec<Network>>, default: &[Network]| {
            if list.is_none() && !default.is_empty() {
                *list = Some(default.to_vec());
            }
        };
        for rule in &mut config.rules {
            fill(&mut rule.external, &self.networks.external);
            // Which pods there are is for the cluster to say, if there is one.
            if !rule.selects() && self.kubernetes.is_none() {
                fill(&mut rule.pods, &self.networks.pods);
            }
        }
        if let Some(pool) = &mut config.port_pool
            && self.kubernetes.is_none()
        {
            let default = if self.role == Role::Node { &self.networks.external } else { &self.networks.pods };
            fill(&mut pool.destinations, default);
        }
        config
    }

    /// As YAML.
    ///
    /// # Errors
    /// If the serializer fails, which it does for no value of this type.
    pub fn to_yaml(&self) -> Result<String, serde_saphyr::SerializeError> {
        serde_saphyr::to_string(self)
    }
}
