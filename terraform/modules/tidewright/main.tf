# Namespace, secrets, and the manifests of an overlay as they are. Terraform keeps no copy of what kustomize knows.

locals {
  documents = [for document in split("\n---\n", trimspace(var.manifests)) : yamldecode(document)]
  namespace = one([for object in local.documents : object if object.kind == "Namespace"])
  # The namespace comes before them, and secrets are no part of an overlay.
  objects = {
    for object in local.documents :
    "${object.kind}/${object.metadata.name}" => object
    if !contains(["Namespace", "Secret"], object.kind)
  }
}

resource "kubernetes_namespace_v1" "this" {
  metadata {
    name   = local.namespace.metadata.name
    labels = try(local.namespace.metadata.labels, {})
  }
}

resource "kubernetes_secret_v1" "this" {
  for_each = var.secret_names

  metadata {
    name      = each.value
    namespace = kubernetes_namespace_v1.this.metadata[0].name
    labels    = { "app.kubernetes.io/name" = "tidewright" }
  }
  data_wo          = var.secrets[each.value]
  data_wo_revision = var.secrets_revision
}

resource "kubernetes_manifest" "this" {
  for_each = local.objects

  manifest = each.value
  # An autoscaler's number is not to be undone.
  computed_fields = ["metadata.annotations", "metadata.labels", "spec.replicas"]

  field_manager {
    force_conflicts = true
  }

  timeouts {
    create = "20m"
    update = "60m"
  }

  depends_on = [kubernetes_secret_v1.this]
}
