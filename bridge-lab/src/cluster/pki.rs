//! Certificates and kubeconfigs of the cluster's components, as kubeadm makes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::lab::Host;

/// First address of the Service network, under which pods reach the API server.
const KUBERNETES_SERVICE: &str = "10.96.0.1";
/// Lifetime of every certificate, in days.
const DAYS: &str = "3";

/// The folder with all certificates, keys and kubeconfigs.
#[derive(Clone, Debug)]
pub(super) struct Pki(PathBuf);

impl Pki {
    /// Writes everything into `folder`. The API server is on the first of `nodes`.
    ///
    /// # Errors
    /// openssl fails, or a file cannot be written.
    pub(super) fn create(folder: PathBuf, nodes: &[Host]) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        let this = Self(folder);
        let server = nodes[0].v4;
        this.openssl(
            &["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", DAYS, "-subj", "/CN=kube-ca"],
            |c| {
                c.args(["-keyout", "ca.key", "-out", "ca.crt"]);
            },
        )?;
        let names = format!(
            "IP:{server},IP:{KUBERNETES_SERVICE},IP:127.0.0.1,DNS:kubernetes,DNS:kubernetes.default,\
             DNS:kubernetes.default.svc"
        );
        this.certificate("apiserver", "/CN=kube-apiserver", &names)?;
        let mut users = vec![
            ("admin".to_owned(), "/O=system:masters/CN=admin".to_owned(), "DNS:admin".to_owned()),
            ("kcm".into(), "/CN=system:kube-controller-manager".into(), "DNS:kcm".into()),
            ("scheduler".into(), "/CN=system:kube-scheduler".into(), "DNS:scheduler".into()),
            ("proxy".into(), "/CN=system:kube-proxy".into(), "DNS:proxy".into()),
        ];
        for (index, node) in nodes.iter().enumerate() {
            let name = super::node_name(index);
            let subject = format!("/O=system:nodes/CN=system:node:{name}");
            users.push((name.clone(), subject, format!("IP:{},DNS:{name}", node.v4)));
        }
        for (name, subject, names) in &users {
            this.certificate(name, subject, names)?;
            this.write_kubeconfig(name, &format!("https://{server}:6443"))?;
        }
        this.openssl(&["genrsa", "-out", "sa.key", "2048"], |_| ())?;
        this.openssl(&["rsa", "-in", "sa.key", "-pubout", "-out", "sa.pub"], |_| ())?;
        Ok(this)
    }

    /// Returns the path of a file of the folder.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Returns the path of the kubeconfig of `user`.
    pub(super) fn kubeconfig(&self, user: &str) -> PathBuf {
        self.path(&format!("{user}.conf"))
    }

    fn certificate(&self, name: &str, subject: &str, names: &str) -> Result<()> {
        let file = |ending: &str| format!("{name}.{ending}");
        let (key, request, certificate, extensions) = (file("key"), file("csr"), file("crt"), file("ext"));
        let extension_lines = format!("subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n");
        fs::write(self.path(&extensions), extension_lines)?;
        self.openssl(&["req", "-newkey", "rsa:2048", "-nodes", "-subj", subject], |c| {
            c.args(["-keyout", &key, "-out", &request]);
        })?;
        self.openssl(
            &["x509", "-req", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", DAYS],
            |c| {
                c.args(["-in", &request, "-out", &certificate, "-extfile", &extensions]);
            },
        )
    }

    fn write_kubeconfig(&self, user: &str, server: &str) -> Result<()> {
        let at = |name: &str| self.path(name).display().to_string();
        let text = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "cluster",
            "clusters": [{"name": "cluster", "cluster": {"server": server, "certificate-authority": at("ca.crt")}}],
            "users": [{"name": user, "user": {
                "client-certificate": at(&format!("{user}.crt")), "client-key": at(&format!("{user}.key")),
            }}],
            "contexts": [{"name": "cluster", "context": {"cluster": "cluster", "user": user}}],
        });
        fs::write(self.kubeconfig(user), text.to_string()).context("write a kubeconfig")
    }

    fn openssl(&self, arguments: &[&str], more: impl FnOnce(&mut Command)) -> Result<()> {
        let mut command = Command::new("openssl");
        command.args(arguments).current_dir(&self.0);
        more(&mut command);
        let output = command.output().context("start openssl")?;
        ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

/// The folder itself, for programs that are started in it.
impl AsRef<Path> for Pki {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}
