//! A server on loopback that answers from a given router.

use axum::Router;
use stacyvm_client::{Client, ClientOptions, SandboxClient};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub(crate) const ID: &str = "sb-00000000000000000001";

/// Serves until it is dropped.
pub(crate) struct Stub {
    pub(crate) client: Client,
    task: JoinHandle<()>,
}

impl Stub {
    pub(crate) async fn start(routes: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = format!("http://{}", listener.local_addr().unwrap());
        let app = Router::new().nest("/api/v1", routes);
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let options = ClientOptions {
            api_key: Some("the-key".to_owned()),
            owner: Some("alice".to_owned()),
            ..ClientOptions::new(server)
        };
        Self { client: Client::new(&options).unwrap(), task }
    }

    pub(crate) fn sandbox(&self) -> SandboxClient {
        self.client.sandbox(ID.parse().unwrap())
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.task.abort();
    }
}
