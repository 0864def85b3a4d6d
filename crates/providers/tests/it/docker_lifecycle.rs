//! Making and destroying sandboxes, and that nothing stays.

use stacyvm_api::{Limit, SandboxId};
use stacyvm_sandbox::{Provider as _, ProviderError, RuntimeState};

use crate::docker_fixture::{DockerFixture, spec};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_is_made_used_and_destroyed() {
    let fixture = DockerFixture::start();
    let id = SandboxId::random();
    let created = fixture.provider.create(&id, &spec(), &()).await.expect("created");
    assert_eq!(created.limits.enforced, [Limit::Memory, Limit::Swap, Limit::Cpu, Limit::Pids]);
    assert_eq!(created.limits.unenforced, [Limit::Disk]);
    assert!(created.image_digest.is_some_and(|digest| digest.starts_with("sha256:")));

    assert_eq!(fixture.output(&id, "echo $GREETING; pwd; hostname; id -u").await, "hello\n/workspace\nbox\n0");
    let listed = fixture.provider.list().await.expect("listed");
    assert_eq!(listed.iter().map(|sandbox| &sandbox.id).collect::<Vec<_>>(), [&id]);
    assert_eq!((listed[0].state, listed[0].image.as_deref()), (RuntimeState::Running, Some("alpine:latest")));
    assert_eq!(listed[0].metadata["test"], "yes");

    fixture.provider.destroy(&id).await.expect("destroyed");
    fixture.provider.destroy(&id).await.expect("destroyed again");
    assert!(fixture.provider.list().await.expect("listed").is_empty());
    assert!(matches!(fixture.provider.connect(&id).await, Err(ProviderError::NotFound(missing)) if missing == id));
    fixture.finish().await;
}
