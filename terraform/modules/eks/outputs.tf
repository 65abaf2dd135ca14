output "name" {
  description = "Name of the cluster: `aws eks update-kubeconfig --name NAME`."
  value       = aws_eks_cluster.this.name
}

output "endpoint" {
  description = "Address of its API."
  value       = aws_eks_cluster.this.endpoint
}

output "ca_certificate" {
  description = "Certificate of its API, in PEM."
  value       = base64decode(aws_eks_cluster.this.certificate_authority[0].data)
}
