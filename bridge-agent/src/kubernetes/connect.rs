//! How the API server is reached.

use std::path::PathBuf;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use thiserror::Error;

use super::thread::PLUGIN_DEADLINE;
use crate::config::Kubernetes;

/// Why nothing can be asked of a cluster.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no service account.
    #[error(
        "no service account of a pod is here ({0}); name a kubeconfig: `kubernetes: {{kubeconfig: PATH}}`, or run the agent \
         as a pod that has one"
    )]
    NotInCluster(String),
    /// The kubeconfig.
    #[error("{}: {reason}; check it with `kubectl --kubeconfig {} version`", path.display(), path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The fault.
        reason: String,
    },
    /// The client cannot be made, for instance of the certificates that are there.
    #[error(
        "no connection to the API server can be made: {0}; check certificates and token of the kubeconfig"
    )]
    Client(String),
    /// The thread of the cluster cannot be started.
    #[error("cannot start the thread that follows the cluster: {0}")]
    Thread(std::io::Error),
    /// The name of this node is not known.
    #[error("the host name cannot be read: {0}; write `kubernetes: {{nodeName: NAME}}`")]
    NodeName(std::io::Error),
}

/// Looks whether there is something to connect with; nothing is asked of the network.
pub(super) fn check(section: &Kubernetes) -> Result<(), Error> {
    match &section.kubeconfig {
        None => Config::incluster().map(drop).map_err(|error| Error::NotInCluster(error.to_string())),
        Some(path) => {
            let wrong = |reason: String| Error::Kubeconfig { path: path.0.clone(), reason };
            let file = Kubeconfig::read_from(&path.0).map_err(|error| wrong(cause(&error)))?;
            let wanted = section.context.as_ref().or(file.current_context.as_ref());
            let wanted =
                wanted.ok_or_else(|| wrong("it has no current context, and `context` names none".into()))?;
            if file.contexts.iter().any(|context| context.name == *wanted) {
                return Ok(());
            }
            let names: Vec<&str> = file.contexts.iter().map(|context| context.name.as_str()).collect();
            Err(wrong(format!("it has no context `{wanted}`, but {}", names.join(", "))))
        }
    }
}

/// Returns a client, and its server's address. Reads all files again: certificates may have been renewed.
pub(super) async fn connect(section: &Kubernetes) -> Result<(Client, String), Error> {
    let config = match &section.kubeconfig {
        None => Config::incluster().map_err(|error| Error::NotInCluster(error.to_string()))?,
        Some(path) => {
            let wrong = |reason: String| Error::Kubeconfig { path: path.0.clone(), reason };
            let file = Kubeconfig::read_from(&path.0).map_err(|error| wrong(cause(&error)))?;
            let options = KubeConfigOptions { context: section.context.clone(), ..Default::default() };
            Config::from_custom_kubeconfig(file, &options).await.map_err(|error| wrong(cause(&error)))?
        }
    };
    let server = config.cluster_url.to_string();
    let client = Client::try_from(config).map_err(|error| {
        let text = cause(&error);
        // The agent has killed it: no plugin kills itself.
        let killed = text.contains("SIGKILL");
        Error::Client(if killed {
            format!("{text}; the credential plugin did not answer within {PLUGIN_DEADLINE:?}")
        } else {
            text
        })
    })?;
    Ok((client, server))
}

/// The name of this node in the cluster.
pub(super) fn node_name(section: &Kubernetes) -> Result<String, Error> {
    if let Some(name) = section.node_name.clone() {
        return Ok(name);
    }
    match std::env::var("NODE_NAME") {
        Ok(name) if !name.is_empty() => Ok(name),
        // As kubelet does.
        _ => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map(|name| name.trim().to_lowercase())
            .map_err(Error::NodeName),
    }
}

/// An error with all that it comes from, each said once.
pub(super) fn cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::leaf::AbsolutePath;

    #[test]
    fn a_kubeconfig_that_cannot_be_used_says_what_to_check() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        let section = |context: Option<&str>| Kubernetes {
            kubeconfig: Some(AbsolutePath(path.clone())),
            context: context.map(str::to_owned),
            ..Kubernetes::default()
        };
        let reason = |context| check(&section(context)).unwrap_err().to_string();
        assert!(reason(None).contains("kubectl --kubeconfig"), "{}", reason(None));
        std::fs::write(
            &path,
            "apiVersion: v1\nkind: Config\ncontexts: [{name: lab, context: {cluster: x, user: y}}]\n",
        )
        .unwrap();
        assert!(reason(None).contains("it has no current context"), "{}", reason(None));
        assert!(reason(Some("prod")).contains("no context `prod`, but lab"), "{}", reason(Some("prod")));
        check(&section(Some("lab"))).unwrap();
    }
}
